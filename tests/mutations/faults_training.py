"""Faults of the training loop: steps, optimizer, order, draws."""

from __future__ import annotations

from tests.mutations.fault import Fault

_RUN = "tests/workers/training/test_independent.py::test_run_is_the_plain_loops"
_GOLDEN = "tests/workers/data/test_golden.py::test_golden"


def _run(config: str, cut: str = "1-None") -> tuple[str, ...]:
    return (f"{_RUN}[{config}-{cut}]",)


def _golden(test: str) -> tuple[str, ...]:
    return (f"{_GOLDEN}_{test}",)


_STEP, _OPTIM, _TRAIN, _WORKER = (
    "sigray.workers.training.step:",
    "sigray.workers.training.optim:",
    "sigray.workers.training.train:",
    "sigray.workers.data.worker:",
)

_EMA = "tests/workers/training/test_ema.py::test_"
_CAPTIONS = "tests/workers/training/test_captions.py::test_"
_DECODER = "tests/workers/model/test_decoder.py::test_decoder_is_big_visions[double-"
_PHASES = "tests/workers/training/test_phases.py::test_"

FAULTS = [
    # Phases.
    Fault(
        "a phase begins a step early",
        "sigray.workers.training.phases:_first_step",
        "-(-samples // train.global_batch_size)",
        "samples // train.global_batch_size",
        (f"{_PHASES}a_phase_is_a_function_of_samples_seen",),
    ),
    Fault(
        "a fresh schedule goes on where the one before was",
        "sigray.workers.training.phases:phases_of",
        "sum(places[begin:number])",
        "sum(places[:number])",
        (f"{_PHASES}a_phase_is_a_function_of_samples_seen",),
    ),
    Fault(
        "the checkpoint of a border is taken for one of the next phase",
        "sigray.workers.training.phases:phase_of_checkpoint",
        "steps_done - 1",
        "steps_done",
        (f"{_PHASES}a_phase_is_a_function_of_samples_seen",),
    ),
    Fault(
        "what starts fresh keeps its weights",
        "sigray.workers.checkpoint.writer:Border.is_fresh",
        "any(",
        "False and any(",
        (f"{_PHASES}a_border_resizes_and_refreshes_what_it_names",),
    ),
    Fault(
        "changed weights of datasets count from the beginning of the run",
        "sigray.workers.data.order:StreamOrder.num_of_dataset",
        "num_samples - mix.start",
        "num_samples",
        ("tests/workers/data/test_order.py::test_changed_weights_hold_from_their_start",),
    ),
    Fault(
        "a longer run moves its borders",
        "sigray.orchestrator.config:check_resume",
        "if phase.start < 1",
        "if False",
        (f"{_PHASES}fractions_pin_the_length_of_a_run",),
    ),
    Fault(
        "the last checkpoints of an attempt are not shared by all ranks",
        "sigray.workers.training.saver:Saver.close",
        "        self._share(self._num_saved - self._num_shared)",
        "        self._share(len(self._unshared))",
        ("tests/workers/training/test_train.py::test_a_step_that_is_left_out_changes_nothing_in_any_attempt",),
    ),
    Fault(
        "the average of the weights moves by d and not by 1 - d",
        _OPTIM + "update_ema",
        "(parameter, 1 - decay)",
        "(parameter, decay)",
        (f"{_EMA}the_average_is_its_closed_form[adamw]",),
    ),
    Fault(
        "the average of the weights begins with zeros",
        _OPTIM + "update_ema",
        "parameter.detach().clone()",
        "torch.zeros_like(parameter)",
        (f"{_EMA}the_average_is_its_closed_form[lion]",),
    ),
    Fault(
        "a resume begins the average of the weights anew",
        "sigray.workers.checkpoint.writer:load_checkpoint",
        "if info.has_ema else {}",
        "if False else {}",
        (f"{_EMA}a_killed_and_resized_run_ends_with_the_same_bits",),
    ),
    Fault(
        "the last weights are exported in place of their average",
        "sigray.orchestrator.run.export:export_run",
        "ema=ema).eval()",
        "ema=False).eval()",
        (
            "tests/orchestrator/run/test_export.py::"
            "test_the_average_of_the_weights_is_exported_unless_the_last_ones_are_wanted",
        ),
    ),
    Fault(
        "clipping never applied",
        _STEP + "Trainer.step",
        'clip if clip is not None else float("inf")',
        'float("inf")',
        _run("adamw_sigmoid"),
    ),
    Fault(
        "gradients are not averaged over ranks",
        _STEP + "Trainer.step",
        "self._device.average_gradients(self.module)",
        "pass",
        _run("adamw_sigmoid", "2-None"),
    ),
    Fault(
        "the schedule counts steps",
        _STEP + "Trainer._set_learning_rate",
        "step * self._global_batch_size",
        "step",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "lr_scale ignored",
        _STEP + "Trainer._set_learning_rate",
        'lr * group.get("lr_scale", 1.0)',
        "lr",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "the same random negatives each step",
        _STEP + "Trainer._global_loss",
        "[self._seed, step]",
        "[self._seed, 0]",
        _golden("random_negatives[seed0step1]"),
    ),
    Fault(
        "the same random negatives for each seed",
        _STEP + "Trainer._global_loss",
        "[self._seed, step]",
        "[0, step]",
        _golden("random_negatives[seed3step0]"),
    ),
    Fault(
        "the same dropout in every step",
        _STEP + "Trainer._encode",
        "[self._seed, batch.step, ",
        "[self._seed, 0, ",
        _run("draws"),
    ),
    Fault(
        "the same dropout on every rank",
        _STEP + "Trainer._encode",
        "self._device.random_rank",
        "0",
        _golden("draws_of_the_towers"),
    ),
    Fault(
        "the same dropout in every micro-batch",
        _STEP + "Trainer._encode",
        ", micro_batch])",
        ", 0])",
        _run("draws", "1-4"),
    ),
    Fault(
        "run.seed not in the weights",
        _STEP + "Trainer.__init__",
        "seed if phase == 0",
        "0 if phase == 0",
        _run("adamw_sigmoid"),
    ),
    Fault("beta1 ignored", _OPTIM + "build_optimizer", "(optim.beta1, ", "(0.9, ", _run("adamw_sigmoid")),
    Fault("beta2 ignored", _OPTIM + "build_optimizer", "optim.beta2)", "0.95)", _run("adamw_sigmoid")),
    Fault("eps ignored", _OPTIM + "build_optimizer", "eps=optim.eps", "eps=1e-8", _run("adamw_sigmoid")),
    Fault(
        "the constant schedule falls",
        _OPTIM + "learning_rate",
        'optim.schedule == "cosine"',
        "True",
        _run("adamw_softmax"),
    ),
    Fault(
        "the schedule begins with the run",
        _OPTIM + "learning_rate",
        "since_warmup = samples_seen - optim.num_warmup_samples",
        "since_warmup = samples_seen",
        ("tests/workers/training/test_step.py::test_schedules_are_those_of_big_vision[rsqrt-0]",),
    ),
    Fault(
        "weight decay on biases",
        _OPTIM + "parameter_groups",
        "decay if kind == decayed else 0.0",
        "decay",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "a group's weight decay ignored",
        _OPTIM + "parameter_groups",
        "optim.weight_decay if own.weight_decay is None else own.weight_decay",
        "optim.weight_decay",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "the cooldown begins late",
        _OPTIM + "learning_rate",
        "min(1.0, (num_samples - samples_seen)",
        "min(1.0, 2 * (num_samples - samples_seen)",
        ("tests/workers/training/test_step.py::test_schedules_are_those_of_big_vision[constant-50]",),
    ),
    Fault(
        "an embedding is a kernel",
        _OPTIM + "decayed_names",
        "nn.Embedding)",
        "nn.LayerNorm)",
        ("tests/workers/training/test_recipe.py::test_kernels_are_what_big_vision_calls_so",),
    ),
    Fault(
        "a timm tower is not asked",
        _OPTIM + "decayed_names",
        'if hasattr(part, "no_weight_decay")',
        'if hasattr(part, "no_weight_decay") and "trunk" not in path',
        ("tests/workers/training/test_recipe.py::test_decay_and_rates_by_layer_are_those_of_timm",),
    ),
    Fault(
        "the embeddings learn as the first block",
        "sigray.workers.model.towers:layer_scales",
        "else -1)",
        "else 0)",
        ("tests/workers/training/test_recipe.py::test_decay_and_rates_by_layer_are_those_of_timm",),
    ),
    Fault(
        "the last, incomplete step dropped",
        "sigray.workers.training.phases:phases_of",
        "-(-config.train.num_samples // batch)",
        "config.train.num_samples // batch",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "the cosine ends before the last step",
        "sigray.workers.training.phases:phases_of",
        "sum(places[begin:following])",
        "config.train.num_samples",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "run.seed not in the label noise",
        _TRAIN + "_train_phase",
        "Noise(job.train.label_noise, job.seed,",
        "Noise(job.train.label_noise, 0,",
        _run("draws"),
    ),
    Fault(
        "the logged loss is summed over ranks",
        "sigray.workers.training.log_window:LogWindow.close",
        "[total / world_size for total in losses]",
        "list(losses)",
        _run("adamw_sigmoid", "2-None"),
    ),
    Fault(
        "the logged loss is that of the window's first step",
        "sigray.workers.training.log_window:LogWindow.close",
        '"train/loss": means[-1]',
        '"train/loss": means[0]',
        _run("adamw_softmax"),
    ),
    Fault(
        "the logged norm is that of the window's first step",
        "sigray.workers.training.log_window:LogWindow.close",
        '"train/grad_norm": norms[-1]',
        '"train/grad_norm": norms[0]',
        _run("adamw_softmax"),
    ),
    Fault(
        "run.seed not in the order, on both sides",
        _WORKER + "build_order",
        "seed=seed",
        "seed=0",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "weights of data sets ignored",
        _WORKER + "build_order",
        "data.shards[name].weight",
        "1.0",
        _run("draws"),
    ),
    Fault(
        "run.seed not in the data-shard worker's order",
        _WORKER + "DataWorker.__init__",
        "build_order(manifest, data, seed)",
        "build_order(manifest, data, 0)",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "run.seed not in crops and captions",
        _WORKER + "DataWorker.__init__",
        "self._seed = manifest, data, seed",
        "self._seed = manifest, data, 0",
        _run("draws"),
    ),
    Fault(
        "captions drawn alike in every epoch",
        _WORKER + "DataWorker._decode",
        "choose_caption(sample.members, random)",
        "choose_caption(sample.members, sample_random(self._seed, 0, ref.shard, ref.index))",
        _run("draws"),
    ),
    Fault(
        "crops equal in all epochs",
        _WORKER + "DataWorker._decode",
        "self._decoder.decode_image(sample.members, out, random)",
        "self._decoder.decode_image(\n"
        "                sample.members, out, sample_random(self._seed, 0, ref.shard, ref.index)\n"
        "            )",
        _run("draws"),
    ),
    Fault(
        "crops and captions equal in all epochs",
        "sigray.workers.data.decode:sample_random",
        "seed, epoch, shard",
        "seed, 0, shard",
        _golden("crops"),
    ),
    Fault(
        "a crop is drawn from the captions' numbers",
        "sigray.workers.data.decode:Decoder.decode_image",
        'random.uniforms("crop")',
        'random.uniforms("caption")',
        _run("draws"),
    ),
    Fault(
        "a crop never reaches the right edge",
        "sigray.workers.data.decode:random_box",
        "(width - box_width + 1)",
        "(width - box_width)",
        _golden("crops"),
    ),
    Fault(
        "weights of captions ignored",
        "sigray.workers.data.decode:Decoder.choose_caption",
        "-math.log1p(-next(uniforms)) / source[1]",
        "-math.log1p(-next(uniforms))",
        _golden("captions"),
    ),
    Fault(
        "shards stand alike in every epoch",
        "sigray.workers.data.order:DatasetOrder._line",
        "0, epoch)",
        "0, 0)",
        _golden("order[seed7lanes2]"),
    ),
    Fault(
        "windows are shuffled alike in every epoch",
        "sigray.workers.data.order:DatasetOrder.window",
        "1, epoch, segment, number",
        "1, 0, segment, number",
        _golden("order[seed7lanes2]"),
    ),
    Fault(
        "windows of a segment are shuffled alike",
        "sigray.workers.data.order:DatasetOrder.window",
        "1, epoch, segment, number",
        "1, epoch, segment, 0",
        _golden("order[seed0lanes5]"),
    ),
    Fault(
        "all data sets of a mix have one seed",
        "sigray.workers.data.order:StreamOrder.__init__",
        "(seed, number) if number else (seed,)",
        "(seed,)",
        _golden("order[seed2lanes3]"),
    ),
    Fault(
        "label noise equal in all epochs",
        "sigray.workers.data.sample_hash:place_hash",
        "samples.T.astype",
        "samples.T[1:].astype",
        _golden("label_noise[seed0]"),
    ),
    Fault(
        "run.seed not in noise images and captions",
        "sigray.workers.data.label_noise:Noise._random",
        "self._seed",
        "0",
        _golden("label_noise[seed5]"),
    ),
    Fault(
        "captions are dealt out in the batch's order",
        "sigray.workers.data.label_noise:Noise.caption_rows",
        'chosen[np.argsort(place_hash(samples[chosen], self._seed, Purpose.NOISE_ORDER), kind="stable")]',
        "chosen",
        _golden("label_noise[seed0]"),
    ),
    Fault(
        "image_mean ignored",
        "sigray.workers.model.towers:normalize_pixels",
        "(inputs.image_mean, ",
        "((0.5, 0.5, 0.5), ",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "image_std ignored",
        "sigray.workers.model.towers:normalize_pixels",
        "inputs.image_std)",
        "(0.5, 0.5, 0.5))",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "init_logit_scale ignored",
        "sigray.workers.model.towers:build_model",
        "init_logit_scale=model.init_logit_scale",
        "init_logit_scale=2.302585",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "init_logit_bias ignored",
        "sigray.workers.model.towers:build_model",
        "init_logit_bias=model.init_logit_bias",
        "init_logit_bias=-10.0",
        _run("adamw_sigmoid"),
    ),
    Fault(
        "a resume takes equal captions in another order",
        "sigray.orchestrator.config:check_resume",
        "orders[0] != orders[1] and",
        "False and",
        ("tests/orchestrator/test_config.py::test_resume_refuses_captions_of_equal_weight_in_another_order",),
    ),
    Fault(
        "a caption in parallel sees the tokens before only",
        "sigray.workers.model.decoder:Decoder.forward",
        "(is_parallel[:, None, None] | causal)",
        "(is_parallel[:, None, None] & False | causal)",
        (f"{_CAPTIONS}loss_and_every_gradient_equal_the_twin[1-1]",),
    ),
    Fault(
        "a caption in parallel reads the tokens before",
        "sigray.workers.model.decoder:Decoder.forward",
        "torch.where(is_parallel[:, None], mask_token, before)",
        "before",
        (f"{_DECODER}mixed biases]",),
    ),
    Fault(
        "the decoder's MLP has the exact GELU",
        "sigray.workers.model.decoder:Block.forward",
        'approximate="tanh"',
        'approximate="none"',
        (f"{_DECODER}autoregressive no biases]",),
    ),
    Fault(
        "the decoder's heads take every second column",
        "sigray.workers.model.decoder:Attention.forward",
        "(self.heads, -1)).transpose(1, 2)",
        "(-1, self.heads)).permute(0, 3, 1, 2)",
        (f"{_DECODER}parallel biases]",),
    ),
    Fault(
        "the first pad does not end a caption",
        "sigray.workers.model.tokenizer:CaptionEnds.weights",
        "np.minimum(length + 1, context_length)",
        "length",
        (f"{_CAPTIONS}the_tokens_that_count[ends0-caption0-3]",),
    ),
    Fault(
        "pads inside a caption do not count",
        "sigray.workers.model.tokenizer:CaptionEnds.weights",
        "np.arange(context_length) < length[:, None]",
        "(np.arange(context_length) < length[:, None]) & found",
        (f"{_CAPTIONS}the_tokens_that_count[ends3-caption3-4]",),
    ),
    Fault(
        "the decoder is not split",
        "sigray.workers.model.towers:named_parts",
        '(*TOWERS, "decoder")',
        "TOWERS",
        (f"{_CAPTIONS}the_decoder_is_split_compiled_and_checkpointed",),
    ),
]
