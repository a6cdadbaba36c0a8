"""Faults of losses/ and native/, the C included."""

from tests.mutations.fault import Fault

_RING = "tests/losses/test_ring.py"
_FUSED = "tests/losses/test_fused.py"
_GRADCACHE = "tests/losses/test_gradcache.py"
_MEANS = "tests/losses/test_logit_means.py"
_NATIVE = "tests/test_native.py"
_NEGATIVES = "tests/losses/test_negatives.py"
_SHARDED = "tests/losses/test_sharded.py"
_TOKENS = "tests/losses/test_tokens.py"
_SIGMOID = "tests/losses/test_sigmoid.py"

FAULTS = [
    Fault(
        "gradients are summed over ranks, not averaged",
        "sigray.losses.gradients:all_reduce_gradients",
        "flat.div_(dist.get_world_size(group))",
        "pass",
        ("tests/losses/test_gradients.py::test_gradients_become_their_mean[True]",),
    ),
    Fault(
        "the product of (1 + e) is folded too late",
        "losses/fused.c:MAX_TERMS",
        "TERMS 120",
        "TERMS 240",
        (f"{_FUSED}::test_long_rows_of_logits_around_zero",),
    ),
    Fault(
        "the product of (1 + e) is folded at the end of a row alone",
        "losses/fused.c:DEFINE_TILE",
        "fold(&vector);",
        "/**********/  ",
        (f"{_FUSED}::test_long_rows_of_logits_around_zero",),
    ),
    Fault(
        "the end of a row is left out",
        "losses/fused.c:DEFINE_TILE",
        "if (j < columns) {",
        "if (j > columns) {",
        (f"{_FUSED}::test_equals_the_float64_twin",),
    ),
    Fault(
        "an element that does not count adds to the gradient by scale",
        "losses/fused.c:terms",
        "max_of(all(-2.0f), x) * sigmoid",
        "x * sigmoid",
        (f"{_FUSED}::test_equals_the_float64_twin",),
    ),
    Fault(
        "bfloat16 is cut off and not rounded",
        "losses/fused.c:narrow",
        "(u + 0x7fff + ((u >> 16) & 1)) >> 16",
        "u >> 16",
        (f"{_FUSED}::test_bfloat16_is_rounded_to_nearest_even",),
    ),
    Fault(
        "a pair's loss lacks its linear part",
        "losses/fused.c:pair_terms",
        "(z > 0 ? 0.0f : -z) + log1pf(e)",
        "log1pf(e)",
        (f"{_FUSED}::test_pairs_equal_the_float64_twin",),
    ),
    Fault(
        "the end of a row's dot product is left out",
        "losses/fused.c:dots_bfloat16",
        "if (j < columns) {",
        "if (j > columns) {",
        (f"{_FUSED}::test_dots_of_rows",),
    ),
    Fault(
        "the eager form gives its sums to the wrong gradients",
        "sigray.losses.fused:negative_terms",
        "sigmoid, cosine * sigmoid",
        "cosine * sigmoid, sigmoid",
        (
            f"{_FUSED}::test_scales_that_are_no_exponentials",
            f"{_SHARDED}::test_any_number_of_slices_is_the_loss_of_the_batch",
        ),
    ),
    Fault(
        "the kernel for CUDA lets excluded cosines count",
        "sigray.losses.fused_cuda:tile_kernel",
        'z = tl.where(counts, t * cosine + b, -float("inf"))',
        "z = t * cosine + b",
        (f"{_FUSED}::test_the_kernel_for_cuda_interpreted",),
    ),
    Fault(
        "feature gradients are divided by the number of texts",
        "sigray.losses.sigmoid:SigmoidPass.finish",
        "self._scale / len(self._image)",
        "self._scale / len(grad_text)",
        (f"{_SIGMOID}::test_equals_the_sum_over_pairs",),
    ),
    Fault(
        "text gradients of one row of tiles replace those of another",
        "sigray.losses.sigmoid:SigmoidPass.visit",
        "overwrite=is_first_row",
        "overwrite=True",
        (f"{_SIGMOID}::test_equals_the_sum_over_pairs",),
    ),
    Fault(
        "a factor before the loss does not reach the bias",
        "sigray.losses.sigmoid:LossResult.gradients",
        "self.grad_bias * grad_loss",
        "self.grad_bias",
        (f"{_SIGMOID}::test_gradients_follow_the_factor_before_the_loss",),
    ),
    Fault(
        "images before the first text count as pairs",
        "sigray.losses.sigmoid:sigmoid_loss",
        "- max(0, -first_image)",
        "",
        (f"{_NEGATIVES}::test_hardest_and_easiest_equal_the_sorted_twin",),
    ),
    Fault(
        "the softmax forgets one of its two directions",
        "sigray.losses.softmax:SoftmaxPass.visit",
        "dz = (dz + (z - normalisers[tile.columns].T).exp_()) / 2",
        "pass",
        (f"{_RING}::test_mean_over_ranks_is_the_loss_of_the_global_batch[softmax-1]",),
    ),
    Fault(
        "the softmax's pairs are half ones",
        "sigray.losses.softmax:SoftmaxPass.visit",
        ".sub_(1)",
        ".sub_(0.5)",
        (f"{_RING}::test_mean_over_ranks_is_the_loss_of_the_global_batch[softmax-1]",),
    ),
    Fault(
        "a tile with a single pair has none",
        "sigray.losses.tiles:Tile.pairs",
        "rows.start < rows.stop",
        "rows.start + 1 < rows.stop",
        (f"{_SIGMOID}::test_equals_the_sum_over_pairs",),
    ),
    Fault(
        "sums of bfloat16 are bfloat16",
        "sigray.losses.tiles:sum_dtype",
        "else torch.float32",
        "else features.dtype",
        (
            f"{_SIGMOID}::test_low_precision_features_are_accumulated_in_float32",
            f"{_MEANS}::test_sums_are_not_taken_in_the_features_dtype",
        ),
    ),
    Fault(
        "one negative too few is kept",
        "sigray.losses.negatives:make_mask",
        "num_negatives - num_kept if",
        "num_negatives - num_kept + 1 if",
        (f"{_NEGATIVES}::test_hardest_and_easiest_equal_the_sorted_twin",),
    ),
    Fault(
        "negative cosines are ordered as their bits",
        "sigray.losses.negatives:_key",
        "^ ((bits >> 31) & 0x7FFFFFFF)",
        "",
        (f"{_NEGATIVES}::test_hardest_and_easiest_equal_the_sorted_twin",),
    ),
    Fault(
        "each seed draws the same random negatives",
        "sigray.losses.negatives:_random_mask",
        "random_drop(images, texts, seed, fraction)",
        "random_drop(images, texts, 0, fraction)",
        (f"{_NEGATIVES}::test_random_negatives_are_as_many_as_asked_and_independent",),
    ),
    Fault(
        "random negatives are numbered within the tile",
        "sigray.losses.negatives:_random_mask",
        "torch.arange(first_text, first_text + num_texts",
        "torch.arange(0, num_texts",
        (f"{_NEGATIVES}::test_random_negatives_do_not_depend_on_tiles",),
    ),
    Fault(
        "the hardest negatives are those of this rank",
        "sigray.losses.ring:ring_sigmoid_loss",
        "return ranks.sum(histogram)",
        "return histogram",
        (f"{_RING}::test_threshold_is_that_of_the_global_batch",),
    ),
    Fault(
        "text gradients of other ranks do not come home",
        "sigray.losses.ring:Ranks.rotate",
        "list(map(combine, results, last_hop.wait()))",
        "[last_hop.wait(), results][1]",
        (f"{_RING}::test_mean_over_ranks_is_the_loss_of_the_global_batch[sigmoid-2]",),
    ),
    Fault(
        "NaN in the first row is let through",
        "sigray.losses.ring:_check_held",
        "if row >= 0",
        "if row > 0",
        (
            f"{_RING}::test_every_rank_refuses_with_the_same_message"
            "[poisoned_scale-NonFiniteFeatures: NaN or infinity in logit_scale of rank 2, row 0]",
        ),
    ),
    Fault(
        "normalisers of other ranks are not summed",
        "sigray.losses.ring:ring_softmax_loss",
        "torch.logaddexp",
        "torch.maximum",
        (f"{_RING}::test_mean_over_ranks_is_the_loss_of_the_global_batch[softmax-2]",),
    ),
    Fault(
        "the sharded loss forgets the pairs' gradient of texts",
        "sigray.losses.sharded:sharded_sigmoid_loss",
        "loss.pairs(text) + _rotate",
        "0 * loss.pairs(text) + _rotate",
        (f"{_SHARDED}::test_any_number_of_slices_is_the_loss_of_the_batch",),
    ),
    Fault(
        "the sharded loss drops other random negatives on the way",
        "sigray.losses.sharded:_SlicedSigmoid.visit",
        ".roll(hops, 0)",
        "",
        (f"{_SHARDED}::test_random_negatives_are_those_of_the_global_batch",),
    ),
    Fault(
        "pairs count among the negatives' mean",
        "sigray.losses.logit_means:mean_logits",
        "(num_pairs * everything - positive)",
        "(num_pairs * everything)",
        (f"{_MEANS}::test_means_equal_those_of_the_matrix",),
    ),
    Fault(
        "the whole batch is one micro-batch",
        "sigray.losses.gradcache:cached_backward",
        "if micro_batch_size >= num_rows:",
        "if num_rows:",
        (f"{_GRADCACHE}::test_micro_batches_give_the_gradients_of_the_whole_batch",),
    ),
    Fault(
        "micro-batches receive each other's gradients",
        "sigray.losses.gradcache:cached_backward",
        "in zip(micro_batches, zip",
        "in zip(micro_batches[::-1], zip",
        (f"{_GRADCACHE}::test_micro_batches_give_the_gradients_of_the_whole_batch[False-5]",),
    ),
    Fault(
        "a device that runs behind is not waited for after the loss",
        "sigray.losses.gradcache:cached_backward",
        "    del features\n    if sync is not None:\n        sync()\n",
        "    del features\n",
        (f"{_GRADCACHE}::test_micro_batches_give_the_gradients_of_the_whole_batch",),
    ),
    Fault(
        "a profile does not wait for the device",
        "sigray.losses.spans:recording",
        "sync=sync",
        "sync=None",
        (f"{_GRADCACHE}::test_a_span_waits_for_the_device_at_its_end_and_for_nothing_without_a_profile",),
    ),
    Fault(
        "a changed source is not compiled",
        "native:build",
        "source.read_bytes() + version",
        "version",
        (f"{_NATIVE}::test_a_change_of_source_or_flags_is_another_library",),
    ),
    Fault(
        "other flags are not compiled",
        "native:build",
        "{[*_FLAGS, *flags]}",
        "{_FLAGS}",
        (f"{_NATIVE}::test_a_change_of_source_or_flags_is_another_library",),
    ),
    Fault(
        "a chunk's gradient of the table replaces that of the chunk before",
        "sigray.losses.tokens:_one_pass",
        "accumulate(grad_weight, slope.T, flat)",
        "accumulate(grad_weight, slope.T, flat, overwrite=True)",
        (f"{_TOKENS}::test_equals_the_equation[dtype0-1e-14-2]",),
    ),
    Fault(
        "all logits of all captions are held",
        "sigray.losses.tokens:token_loss",
        "default_tile_size(hidden.device)",
        "2**20",
        (f"{_TOKENS}::test_the_logits_of_one_chunk_are_held",),
    ),
]
