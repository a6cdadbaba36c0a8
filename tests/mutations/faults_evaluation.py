"""Faults of the linear probe, and of the checks of held-out sets."""

from tests.mutations.fault import Fault

_CHECKS = "tests/workers/evaluation/test_set_checks.py"
_KEYS = "tests/test_keys_arrive.py"
_PROBE = "tests/workers/evaluation/test_linear_probe.py"

_RECALL = "tests/workers/evaluation/test_evaluate.py::test_recall_is_that_of_clip_benchmark"

_SHEETS = "tests/workers/evaluation/test_sheet_captions.py::test_"

FAULTS = [
    Fault(
        "the decoder sees other images than the sheet shows",
        "sigray.workers.evaluation.features:FeatureWorker._write_captions",
        "list(images.values())",
        "list(images.values())[::-1]",
        (f"{_SHEETS}captions_are_those_of_each_image_alone[plain]",),
    ),
    Fault(
        "a decoder that has not trained writes captions",
        "sigray.workers.training.phases:has_trained_decoder",
        " and phase.first_step < steps_done",
        "",
        ("tests/orchestrator/run/test_evaluations.py::test_only_a_decoder_that_has_trained_writes_captions[later]",),
    ),
    Fault(
        "captions of parts are mixed up",
        "sigray.workers.evaluation.features:_join",
        "{first + row: text for",
        "{row: text for",
        (f"{_SHEETS}captions_are_those_of_each_image_alone[named]",),
    ),
    Fault(
        "one caption of an image counts",
        "sigray.workers.evaluation.datasets:load",
        "decoder.captions(sample.members) if",
        "decoder.captions(sample.members)[:1] if",
        ("tests/workers/evaluation/test_evaluate.py::test_all_captions_of_a_list_are_read",),
    ),
    Fault(
        "equal captions are merged for images",
        "sigray.workers.evaluation.evaluate:retrieval_recall",
        "(image, nearest_captions, image, every, len(text))",
        "(image, nearest_texts, image, text, len(text))",
        (f"{_RECALL}[2-16777216]",),
    ),
    Fault(
        "the rate over distinct captions",
        "sigray.workers.evaluation.evaluate:retrieval_recall",
        "(every, nearest_images, text, image,",
        "(text, nearest_images, text, image,",
        (f"{_RECALL}[2-16777216]",),
    ),
    Fault(
        "the chance of an image with several captions is that of one",
        "sigray.workers.evaluation.evaluate:_chance",
        "num_candidates - right, min(",
        "num_candidates - 1, min(",
        ("tests/workers/evaluation/test_evaluate.py::test_chance_of_retrieval_is_that_of_a_blind_draw[5]",),
    ),
    Fault(
        "ties of penalties are resolved the other way",
        "sigray.workers.evaluation.linear_probe:_choose_penalty",
        "best = max(best, (hits, penalty))",
        "best = (hits, penalty) if hits >= best[0] else best",
        (f"{_PROBE}::test_clouds_apart_are_named_and_unknown_classes_are_wrong",),
    ),
    Fault(
        "the bias has a penalty too",
        "sigray.workers.evaluation.linear_probe:fit_logistic",
        "weights[:, :-1].square()",
        "weights.square()",
        (f"{_PROBE}::test_the_solution_is_newtons",),
    ),
    Fault(
        "images of unknown classes do not count",
        "sigray.workers.evaluation.linear_probe:linear_probe",
        "== truth).double().mean()",
        "== truth)[truth >= 0].double().mean()",
        (f"{_PROBE}::test_clouds_apart_are_named_and_unknown_classes_are_wrong",),
    ),
    Fault(
        "only the first shard of a set is looked at",
        "sigray.workers.evaluation.set_checks:_check_set",
        "shards[:: -(-len(shards) // _NUM_SHARDS)]",
        "shards[:1]",
        (f"{_CHECKS}::test_what_is_wrong_with_a_set_is_named",),
    ),
    Fault(
        "a set with one unusable sample is refused",
        "sigray.workers.evaluation.set_checks:_check_samples",
        "if 0 < num_read == reasons[need].total():",
        "if reasons[need]:",
        (f"{_CHECKS}::test_what_is_wrong_with_a_set_is_named",),
    ),
    Fault(
        "a linear probe's set is not looked at",
        "sigray.workers.evaluation.set_checks:check_sets",
        "spec.linear_probe is not None",
        "spec.linear_probe is None and spec.classes",
        (f"{_CHECKS}::test_what_is_wrong_with_a_set_is_named",),
    ),
    Fault(
        "a resumed run saves and evaluates its initial weights again",
        "sigray.workers.training.saver:restore",
        "info.step if info else None",
        "(info.step or None) if info else None",
        (f"{_KEYS}::test_a_run_goes_on_from_its_initial_weights",),
    ),
]
