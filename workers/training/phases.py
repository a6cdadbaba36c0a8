"""The phases of a run: what holds from which step on.

Loss, image size, mixture and learning rate may change. A phase is a function of samples seen, so it survives kills and
resizes as the order does. Pure arithmetic, without torch: the driver, `sigray plan` and the pages use it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, TypeVar

from sigray.workers.config import LossConfig, ModelConfig, OptimConfig, PhaseConfig, Section, TrainConfig

AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Schedule:
    """Which place of its learning-rate schedule a sample of a phase has.

    Without stretched phases, a place is a number of samples.

    Attributes:
        length: of the schedule.
        first_sample: of the phase, counted over the run.
        offset: place of that sample; 0 if the schedule begins with the phase.
        stretch: samples from one place to the next.
    """

    length: float
    first_sample: int = 0
    offset: float = 0
    stretch: float = 1

    def place(self, samples_seen: int) -> float:
        """Return the place of the step that begins after so many samples of the run."""
        return self.offset + _scaled(samples_seen - self.first_sample, self.stretch)


@dataclass(frozen=True)
class Phase:
    """What holds from `first_step` on, up to `end_step`.

    Attributes:
        number: from 0; phase 0 is what the config says outside of `phases`.
        changes: `key=value` of what differs from the phase before.
        init_fresh: patterns of the parameters that start fresh with the phase.
    """

    number: int
    first_step: int
    end_step: int
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    schedule: Schedule
    changes: tuple[str, ...] = ()
    init_fresh: tuple[str, ...] = ()


class HasPhases(Protocol):
    """A run's config, or a training worker's job."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def loss(self) -> LossConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def phases(self) -> list[PhaseConfig]: ...


def phases_of(config: HasPhases) -> list[Phase]:
    """Return the phases of a run, phase 0 first.

    Raises:
        ValueError: as `changed`; if two begin at the same step, or one at the beginning or after the end.
    """
    batch = config.train.global_batch_size
    num_steps = -(-config.train.num_samples // batch)
    first_steps = [0, *(_first_step(phase, config.train) for phase in config.phases)]
    for number, step in enumerate(first_steps[1:]):
        if not first_steps[number] < step < num_steps:
            raise ValueError(
                f"phases.{number}.start={config.phases[number].start:g}: it begins at step {step} of {num_steps} "
                f"(train.num_samples={config.train.num_samples}, train.global_batch_size={batch}), and the phase "
                f"before it at step {first_steps[number]}: each must begin later, and before the end"
            )
    end_steps = [*first_steps[1:], num_steps]
    lengths = [(end - first) * batch for first, end in zip(first_steps, end_steps, strict=True)]
    stretches = [1.0, *(phase.stretch for phase in config.phases)]
    begins = [0] + [number for number, phase in enumerate(config.phases, 1) if phase.schedule == "fresh"]
    places = [_scaled(*each) for each in zip(lengths, stretches, strict=True)]
    model, loss, optim = config.model, config.loss, config.optim
    given: PhaseConfig | None = None
    changes: list[str] = []
    found = []
    for number, (first, end) in enumerate(zip(first_steps, end_steps, strict=True)):
        if number:
            given = config.phases[number - 1]
            before = {"loss": loss, "optim": optim}
            model = model.model_copy(update={"image_size": given.image_size or model.image_size})
            loss = changed(loss, given.loss)
            optim = changed(optim, given.optim)
            changes = _changes(given, before, {"loss": loss, "optim": optim})
        begin = max(other for other in begins if other <= number)
        following = min([other for other in begins if other > number], default=len(first_steps))
        length, offset = sum(places[begin:following]), sum(places[begin:number])
        schedule = Schedule(length, first * batch, offset, stretches[number])
        fresh = tuple(given.init_fresh) if given is not None else ()
        found.append(Phase(number, first, end, model, loss, optim, schedule, tuple(changes), fresh))
    return found


def changed(section: AnySection, given: Mapping[str, Any]) -> AnySection:
    """Return a section with the keys that a phase gives.

    A section within it keeps the keys that are not given, too.

    Raises:
        pydantic.ValidationError: for an unknown key, another type, or keys that contradict.
    """
    return type(section).model_validate(_merged(section, given))


def _merged(section: Section, given: Mapping[str, Any]) -> dict[str, Any]:
    content = section.model_dump()
    for key, value in given.items():
        own = getattr(section, key, None)
        content[key] = _merged(own, value) if isinstance(own, Section) and isinstance(value, Mapping) else value
    return content


def _changes(given: PhaseConfig, before: Mapping[str, Section], after: Mapping[str, Section]) -> list[str]:
    """Return `key=value` of what a phase changes.

    Args:
        before, after: sections by name, of the phase before and of this one.
    """
    found: list[str] = []
    for name, value in given:
        if name in before:
            found += _changed_keys(name, value, before[name], after[name])
        elif name != "start" and value != PhaseConfig.model_fields[name].get_default(call_default_factory=True):
            found.append(f"{name}={value}")
    return found


def _changed_keys(path: str, given: Mapping[str, Any], before: Section, after: Section) -> Iterator[str]:
    for key, value in given.items():
        was, becomes = getattr(before, key), getattr(after, key)
        if isinstance(was, Section) and isinstance(becomes, Section):
            yield from _changed_keys(f"{path}.{key}", value, was, becomes)
        elif becomes != was:
            yield f"{path}.{key}={value}"


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Return the phase of a step, counted from 0; after the last step, the last phase."""
    return next(phase for phase in reversed(phases) if phase.first_step <= step)


def phase_of_checkpoint(phases: Sequence[Phase], steps_done: int) -> Phase:
    """Return the phase whose weights a checkpoint holds.

    At a border, that which ends there.
    """
    return phase_at(phases, max(steps_done - 1, 0))


def has_trained_decoder(phases: Sequence[Phase], steps_done: int) -> bool:
    """Return whether captions had a weight in any step before a checkpoint."""
    return any(phase.loss.caption_weight > 0 and phase.first_step < steps_done for phase in phases)


def mixes_of(config: HasPhases) -> list[tuple[int, Mapping[str, float]]]:
    """Return each change of the mixture: samples before it, weights by dataset."""
    batch = config.train.global_batch_size
    return [
        (phase.first_step * batch, given.weights)
        for phase, given in zip(phases_of(config)[1:], config.phases, strict=True)
        if given.weights is not None
    ]


def _first_step(phase: PhaseConfig, train: TrainConfig) -> int:
    samples = Fraction(repr(phase.start))  # the decimal number that the YAML has
    if phase.start < 1:
        samples *= train.num_samples
    return -(-samples // train.global_batch_size)


def _scaled(samples: int, stretch: float) -> float:
    return samples if stretch == 1 else samples / stretch  # integers stay exact
