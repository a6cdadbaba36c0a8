"""Faults of the data plane: tars, shards, S3, decoding, data workers, feed, stores, tokenizers, towers, evaluation."""

from __future__ import annotations

from tests.mutations.fault import Fault

_W = "tests/workers/test_"
_BOUNDS, _PLANE, _LISTS = f"{_W}bounds.py::test_", f"{_W}data_plane.py::test_", f"{_W}pace.py::test_"
_MEMORY, _DECODE, _STORE = f"{_W}shared_memory.py::test_", f"{_W}decode.py::test_", f"{_W}store.py::test_"

FAULTS = [
    # The feed: what it holds, what it counts, what it hands out.
    Fault(
        "bad samples are measured against 1,024 for ever",
        "workers.feed:Feed._count",
        "max(self._num_read, 1024)",
        "1024",
        (f"{_BOUNDS}a_rate_of_bad_samples_is_one_of_all_samples_read[200-False]",),
    ),
    Fault(
        "bad samples are never measured",
        "workers.feed:Feed._count",
        "if num_refused > self._max_bad_fraction * ",
        "if self._max_bad_fraction < 0 < ",
        (f"{_BOUNDS}a_rate_of_bad_samples_is_one_of_all_samples_read[67-True]",),
    ),
    Fault(
        "blocks are never released",
        "workers.feed:Feed._batches",
        "del blocks[place]",
        "pass",
        (f"{_BOUNDS}blocks_are_released_when_no_later_batch_needs_them",),
    ),
    Fault(
        "a buffer is never used again",
        "workers.feed:_Buffers.take",
        "sys.getrefcount(buffer.array) == 2",
        "sys.getrefcount(buffer.array) == 1",
        (f"{_BOUNDS}buffers_of_batches_are_used_again",),
    ),
    Fault(
        "a buffer is used again while somebody holds the batch",
        "workers.feed:_Buffers.take",
        "sys.getrefcount(buffer.array) == 2",
        "True",
        (f"{_PLANE}each_row_of_batches_that_are_held_is_its_samples",),
    ),
    Fault(
        "a batch is handed out while somebody late may write into it",
        "workers.feed:Feed._assemble",
        "if buffer.num_writers:",
        "if False:",
        (f"{_MEMORY}batches_that_are_handed_out_stay_as_they_are[12-1]",),
    ),
    Fault(
        "a rank takes the rows of a block from its beginning",
        "workers.feed:Feed._assemble",
        "blocks[piece.block].images[piece.first : piece.last]",
        "blocks[piece.block].images[: piece.last - piece.first]",
        (f"{_MEMORY}batches_that_are_handed_out_stay_as_they_are[10-2]",),
    ),
    # Data workers: blocks and what stands in for bad samples.
    Fault(
        "a sample with doubled members stands in for another",
        "workers.data_worker:DataWorker._replacement",
        "if sample.has_duplicates:",
        "if False:",
        (f"{_PLANE}a_sample_with_doubled_members_stands_in_for_none",),
    ),
    Fault(
        "a sample with doubled members is used",
        "workers.data_worker:DataWorker._decode",
        "if sample.has_duplicates:",
        "if False:",
        (f"{_PLANE}a_sample_with_doubled_members_stands_in_for_none",),
    ),
    Fault(
        "replacements are not marked",
        "workers.data_worker:DataWorker._decode_block",
        "block.replaced[row] = True",
        "pass",
        (f"{_PLANE}bad_samples_are_counted_and_replaced",),
    ),
    Fault(
        "a replaced row keeps the key of the refused sample",
        "workers.data_worker:DataWorker._decode_block",
        "sample, caption = self._replacement(",
        "_, caption = self._replacement(",
        (f"{_PLANE}bad_samples_are_counted_and_replaced",),
    ),
    Fault(
        "the cache grows beyond data.cache_mib",
        "workers.data_worker:_Cache.put",
        "self._free_bytes -= num_bytes",
        "pass",
        (f"{_PLANE}cache_takes_no_more_than_it_may",),
    ),
    Fault(
        "the block decoded last makes room",
        "workers.data_worker:DataWorker.block",
        "blocks.popitem(last=False)",
        "blocks.popitem(last=True)",
        (f"{_PLANE}the_newest_blocks_of_a_lane_are_kept[1]",),
    ),
    Fault(
        "encoded samples are never released",
        "workers.data_worker:_Windows.get",
        "len(loaded) > self._num_kept",
        "False",
        (f"{_BOUNDS}encoded_samples_are_released_with_their_window",),
    ),
    # Tars and shards.
    Fault(
        "a size from a pax header is kept for the next member",
        "workers.tar:read_members",
        "        first, long_name, long_size = source.position, None, None",
        "        first, long_name = source.position, None",
        (f"{_W}tar.py::test_a_size_of_pax_is_one_members",),
    ),
    Fault(
        "a sample's second member of one name replaces the first",
        "workers.tar:read_tar",
        "sample.has_duplicates = True",
        "sample.members[ending] = member.content",
        (f"{_PLANE}a_sample_with_doubled_members_stands_in_for_none",),
    ),
    Fault(
        "a shard with other content passes for the same",
        "workers.shards:Manifest.differences",
        "(shard.num_bytes, shard.fingerprint) != (after[url].num_bytes, after[url].fingerprint)",
        "shard.num_samples != shard.num_samples",
        (f"{_W}shards.py::test_shard_that_changes_under_the_run",),
    ),
    Fault(
        "a shard is read from its mark on, not from the sample asked for",
        "workers.shards:read_samples",
        "if sample.index >= start:",
        "if True:",
        (f"{_W}shards.py::test_reading_starts_anywhere",),
    ),
    # S3.
    Fault(
        "If-Match is not sent",
        "workers.s3:_Fetcher._attempt",
        ', "If-Match": f\'"{self.info.etag}"\'}',
        "}",
        (f"{_W}s3.py::test_every_get_asks_for_the_version_of_the_manifest",),
    ),
    Fault(
        "an answer of another version is taken",
        "workers.s3:_Fetcher._judge",
        "if etag and etag != self.info.etag:",
        "if False:",
        (f"{_W}s3.py::test_a_store_without_if_match_gives_no_mixture_either",),
    ),
    Fault(
        "waits between tries do not grow",
        "workers.s3:after_failure",
        "* 2 ** min(failures.total() - 1, 16)",
        "",
        (f"{_W}s3.py::test_failures_and_what_is_done_about_them",),
    ),
    Fault(
        "a refused signature is renewed again and again",
        "workers.s3:after_failure",
        'kind == "denied" and failures[kind] == 1',
        'kind == "denied"',
        (f"{_W}s3.py::test_failures_and_what_is_done_about_them",),
    ),
    Fault(
        "the copy used last makes room in the shard cache",
        "workers.s3:ShardCache._reserve",
        "copies.sort()",
        "copies.sort(reverse=True)",
        (f"{_W}s3.py::test_the_cache_keeps_what_was_used_last",),
    ),
    # Decoding and resizing.
    Fault(
        "a damaged JPEG is filled with grey",
        "workers.decode:decode_pixels",
        'simplejpeg.decode_jpeg(content, "RGB")',
        'simplejpeg.decode_jpeg(content, "RGB", strict=False)',
        (f"{_DECODE}jpeg_with_damaged_entropy_bytes_is_refused",),
    ),
    Fault(
        "the EXIF orientation of a JPEG is not looked at",
        "workers.decode:decode_pixels",
        "_jpeg_orientation(content)",
        "1",
        (f"{_DECODE}pictures_stand_as_exif_says[6-JPEG]",),
    ),
    Fault(
        "a picture is cut at its corner, not in the centre",
        "workers.decode:_resize_and_cut_centre",
        "corner=corner",
        "corner=(0, 0)",
        (f"{_DECODE}centre_is_the_middle_of_the_whole_image_resized",),
    ),
    Fault(
        "a part is cut from the corner of the resized image",
        "workers.resize:_resize_by_torch",
        "whole[top : top + height, left : left + width]",
        "whole[:height, :width]",
        (f"{_W}resize.py::test_a_part_by_torch_is_that_part_of_the_whole",),
    ),
    # Memory of batches that data workers write into.
    Fault(
        "another file at a known address is taken for the buffer",
        "workers.shared_memory:Address.open",
        "if _shows(os.getpid(), descriptor, self.name):",
        "if True:",
        (f"{_MEMORY}what_stands_at_an_address_is_the_buffer_or_nothing",),
    ),
    Fault(
        "memory of buffers that are gone stays mapped",
        "workers.shared_memory:Mappings._open",
        "if known.is_there()",
        "if known",
        (f"{_MEMORY}memory_of_buffers_that_are_gone_is_let_go",),
    ),
    Fault(
        "rows are written one place behind",
        "workers.shared_memory:Mappings.rows",
        "batch[place.row + number]",
        "batch[place.row + number - 1]",
        (f"{_MEMORY}a_block_wanted_whole_is_decoded_where_it_belongs_and_a_part_of_one_for_others_too",),
    ),
    # Pools and readers that keep pace.
    Fault(
        "a reader leaves others behind by a block",
        "workers.pace:leaves_behind",
        "number <= other + window + 1",
        "number < other + window + 1",
        (f"{_LISTS}leaves_behind",),
    ),
    Fault(
        "a reader that is lost holds the others up",
        "workers.pace:WorkerList.may_ask",
        "and now - since < _LOST_S",
        "",
        (f"{_LISTS}a_reader_that_is_lost_or_leaves_holds_nobody_up",),
    ),
    Fault(
        "a reader that waits is taken for lost",
        "workers.pace:WorkerList.may_ask",
        "self._readers[reader] = number - 1, now",
        "pass",
        (f"{_LISTS}a_reader_that_waits_is_not_taken_for_lost",),
    ),
    Fault(
        "data workers are kept away from the only hosts that there are",
        "workers.pool:placement",
        "len(training) in (0, len(alive))",
        "not training",
        (f"{_W}pool.py::test_placement_of_data_shard_workers",),
    ),
    # Embedding stores.
    Fault(
        "crop_ratio is not in a store's key",
        "workers.store:store_key",
        ', "crop_ratio": list(data.crop_ratio)',
        "",
        (f"{_STORE}a_stores_key_holds_whatever_changes_its_numbers[data-crop_ratio]",),
    ),
    Fault(
        "max_image_pixels is not in a store's key",
        "workers.store:store_key",
        '"max_image_pixels": data.max_image_pixels,',
        "",
        (f"{_STORE}a_stores_key_holds_whatever_changes_its_numbers[data-max_image_pixels]",),
    ),
    Fault(
        "the first view of an embedding is read for each",
        "workers.store:EmbeddingReader.read",
        "view * (",
        "0 * (",
        (f"{_STORE}views_are_crops_and_each_epoch_draws_one",),
    ),
    # Tokenizers, weights to begin with, features of evaluations, figures, metrics.
    Fault(
        "a caption that is cut has no end of text",
        "workers.tokenizer:_ClipTokenizer.__call__",
        "[begin, *ids[: self._context_length - 2], end]",
        "[begin, *ids, end][: self._context_length]",
        (f"{_W}towers.py::test_open_clip_tokenizer_pads_and_cuts",),
    ),
    Fault(
        "case is folded where it was not asked for",
        "workers.tokenizer:train_tokenizer",
        "if lower_case else []",
        "if True else []",
        (f"{_W}tokenizer.py::test_case_is_folded_where_asked",),
    ),
    Fault(
        "tensors that the model does not have are not named",
        "workers.initial:_match",
        "[name for name in state if name not in own]",
        "[]",
        (f"{_W}initial.py::test_more_and_less_than_the_model_has",),
    ),
    Fault(
        "class names of several templates are mixed",
        "workers.features:Crew.prompts",
        "for template in templates for name in names",
        "for name in names for template in templates",
        (f"{_W}features.py::test_prompts_are_the_mean_over_templates_of_one_name",),
    ),
    Fault(
        "a tie counts for the model",
        "workers.evaluate:_rank_of",
        " + ((scores == own).sum(dim=1) - 1) / 2",
        "",
        (f"{_W}evaluate.py::test_a_collapsed_model_is_not_rewarded",),
    ),
    Fault(
        "a caption of several images finds only its first",
        "workers.evaluate:retrieval_recall",
        "similarity[owner == caption, caption].max()",
        "similarity[owner == caption, caption][0]",
        (f"{_W}evaluate.py::test_a_caption_finds_any_of_its_images",),
    ),
    Fault(
        "a data worker's totals are added again and again",
        "workers.metrics:WorkerMetrics._add",
        "self._told[name, key] = int(total)",
        "pass",
        ("tests/orchestrator/test_monitoring.py::test_what_runs_and_workers_set",),
    ),
]
