"""The decoding step of fixed shape: the same answers, and nothing in it that a GPU could not record and replay."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memgen.generation.state as state
import memgen.generation.static_step as static_step
import memgen.generation.step as step_module
from architectures import ARCHITECTURES, random_lm
from generations import invoke_probs, logprobs
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.generation.static_step import StaticStep
from memgen.model.backbone import Backbone
from memgen.model.cache import PassSegment, RowKVCache
from memgen.model.reasoner import Reasoner
from memgen.types import Decision, InsertionKind
from tiny import random_rows, tiny_memgen
from tolerance import assert_close

GREEDY = GenerationSettings(max_new_tokens=24)
DRAWN = GenerationSettings(max_new_tokens=24, temperature=1.0, seed=5)
CUT = GenerationSettings(max_new_tokens=24, temperature=1.2, top_p=0.9, top_k=40, seed=3)
LENGTHS = [9, 4, 17, 1, 12, 6, 30, 8, 3, 21]
TRIGGERS = ["always", "random", "tokens", "hidden_states", "never"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch):
    """Steps of several sizes follow each other even in short answers."""
    monkeypatch.setattr(static_step, "READ_STEP", 16)


def both(model, prompts, settings, **options):
    return [
        generate(model, prompts, replace(settings, static_step=switch), **options) for switch in ("on", "off")
    ]


def inserting_steps(generation) -> int:
    """Steps behind the prompt's in which some row inserts."""
    steps = set()
    for turn in generation.turns:
        begin = len(turn.context)
        steps |= {point - begin for point, kind in turn.insertions if kind == InsertionKind.INFERENCE}
    return len(steps)


def assert_same(model, static, dynamic) -> None:
    assert static.answers() == dynamic.answers()
    assert static.plan.rows() == dynamic.plan.rows()
    for row, (ours, theirs) in enumerate(zip(static.turns, dynamic.turns, strict=True)):
        assert (ours.decisions, ours.finished) == (theirs.decisions, theirs.finished)
        assert_close("probabilities", invoke_probs(static, row), invoke_probs(dynamic, row))
        assert_close(f"row {row}", logprobs(static, row), logprobs(dynamic, row))
    ours, expected = vars(static.work), dict(vars(dynamic.work))
    if model.trigger.kv_cache(1, 1, CPU) is not None and model.weaver.config.reads == "embeddings":
        # The trigger is asked while the tokens are read, so latents take a pass of their own.
        expected["reasoner_forwards"] += inserting_steps(dynamic)
    assert ours == expected


@pytest.mark.parametrize("settings", [GREEDY, DRAWN, CUT], ids=["greedy", "drawn", "cut"])
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_answers_decisions_and_work_are_those_of_the_ragged_engine(trigger, reads, settings):
    model = tiny_memgen(trigger=trigger, reads=reads)
    # Rows stop at different steps, so that the step becomes smaller.
    static, dynamic = both(model, random_rows(LENGTHS), settings, stop=lambda tokens: tokens[-1] % 23 == 0)
    assert_same(model, static, dynamic)
    assert len(set(static.lengths)) > (1 if settings is GREEDY else 3)
    if trigger in ("tokens", "hidden_states"):
        taken = {decision for turn in static.turns for decision in turn.decisions}
        assert {int(Decision.SKIP), int(Decision.INVOKE)} <= taken


@pytest.mark.parametrize("trigger", ["tokens", "hidden_states"])
def test_drawn_decisions_of_groups_are_those_of_the_ragged_engine(trigger):
    model = tiny_memgen(trigger=trigger, own_bases=True)
    settings = GenerationSettings(max_new_tokens=16, temperature=1.0, group_size=3, sample_decisions=True)
    static, dynamic = both(model, random_rows([9, 5, 1]), settings)
    assert_same(model, static, dynamic)
    assert sum(static.plan.counts) > 9


@pytest.mark.parametrize("trigger", ["always", "tokens", "hidden_states"])
def test_the_observer_and_the_latents_are_those_of_the_ragged_engine(trigger):
    model = tiny_memgen(trigger=trigger)
    heard: dict[str, list] = {"on": [], "off": []}
    latents = {}
    for switch, events in heard.items():
        generation = generate(
            model,
            random_rows(LENGTHS),
            replace(DRAWN, static_step=switch),
            observe=lambda row, token, events=events: events.append((row, token)),
            keep_latents=True,
        )
        latents[switch] = [block for row in generation.latents for block in row]
    for row in range(len(LENGTHS)):
        ours, theirs = ([e for e in heard[switch] if e[0] == row] for switch in ("on", "off"))
        assert ours == theirs
    assert_close("latents", torch.cat(latents["on"]), torch.cat(latents["off"]))


def test_a_model_that_is_read_through_its_modules_may_take_static_steps_too():
    model = tiny_memgen(trigger="hidden_states")
    for base in model.bases():
        base.compute_directly(False)
    assert_same(model, *both(model, random_rows(LENGTHS), DRAWN))


def test_a_row_that_fills_its_line_to_the_last_slot_disturbs_no_other(monkeypatch):
    monkeypatch.setattr(static_step, "READ_STEP", 7)
    model = tiny_memgen(delimiters=("z",))
    static, dynamic = both(model, random_rows([40, 1, 1]), GREEDY)
    assert_same(model, static, dynamic)


def test_on_a_cpu_steps_have_a_fixed_shape_only_if_that_is_asked_for(monkeypatch):
    model = tiny_memgen()
    made = []
    original = StaticStep.run
    monkeypatch.setattr(StaticStep, "run", lambda *a: made.append(1) or original(*a))
    generate(model, random_rows([9]), GREEDY)
    assert not made
    generate(model, random_rows([9]), replace(GREEDY, static_step="on"))
    assert made


# What a GPU needs in order to record a step


class Reads(TorchFunctionMode):
    """Lists what the host reads of tensors."""

    NAMES = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            self.seen.append((name, args[0].dtype))
        return func(*args, **(kwargs or {}))


class NoHostReads(TorchDispatchMode):
    """Refuses operations that wait for the device, or whose result's shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        for part in (
            "_local_scalar_dense",
            "nonzero",
            "unique",
            "masked_select",
            "is_nonzero",
            "equal.default",
        ):
            assert part not in name, f"{name} waits for the device"
        assert "repeat_interleave.Tensor" not in name, f"{name} waits for the device"
        if "aten.index" in name:
            assert not [t for t in tree_leaves(args[1:]) if getattr(t, "dtype", None) == torch.bool]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads():
    reads = Reads()
    with reads, NoHostReads():
        yield
    assert not reads.seen


class Recorder(TorchDispatchMode):
    """What a CUDA graph does: keeps the operations of a run with the very tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            now = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def prepared(backbone, settings, lengths):
    """A cache that holds rows of these lengths, and a step on it."""
    cache = RowKVCache(len(lengths), 48, CPU)
    ids = torch.randint(2, 64, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    backbone(backbone.embed(ids), cache.open([PassSegment(range(len(lengths)), lengths)]))
    return cache, StaticStep(Reasoner(backbone, (1,)), cache, settings)


STEP = GenerationSettings(temperature=0.8)
CUT_STEP = GenerationSettings(temperature=1.1, top_k=20, top_p=0.9)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        *((config, STEP) for config in ARCHITECTURES.values()),
        (ARCHITECTURES["qwen2"], GenerationSettings()),
        (ARCHITECTURES["qwen2"], CUT_STEP),
    ],
    ids=[*ARCHITECTURES, "greedy", "cut"],
)
@torch.no_grad()
def test_a_step_that_is_recorded_once_and_replayed_on_other_rows_is_the_step_itself(config, settings):
    backbone = Backbone(random_lm(config))
    lengths = [5, 11, 1, 8]
    results = []
    for replayed in (False, True):
        cache, step = prepared(backbone, settings, lengths)
        recorder = Recorder()
        found = []
        for number, rows in enumerate((4, 4, 3, 3)):
            tokens = [(7 * number + 3 * row) % 60 + 2 for row in range(rows)]
            draws = [((number + 1) * (row + 1) * 0.137) % 1 for row in range(rows)]
            if number == 3:
                cache.truncate(1, 2)  # A row may lie anywhere.
            feed(cache, step, tokens, draws)
            if replayed and number > 0:
                recorder.replay()
            else:
                with recorder, no_host_reads():
                    step.compute(4, 32)
            found += [step.outputs[:, :rows].clone(), step.states[:rows].clone()]
        results.append(found)
    for index, (ours, expected) in enumerate(zip(*results, strict=True)):
        assert_close(str(index), ours, expected)
    assert not torch.equal(results[0][0], results[0][2])


def feed(cache, step, tokens, draws) -> None:
    """Puts what a step reads in its place, as `run` does."""
    positions = [cache.length(row) for row in range(len(tokens))]
    step.inputs.zero_()
    for line, numbers in enumerate((tokens, positions, draws)):
        step.inputs[line, : len(tokens)] = torch.tensor(numbers, dtype=torch.float64)
    cache.advance(range(len(tokens)))


@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_storage_and_shapes_are_the_same_in_all_steps_of_a_size(trigger, reads, monkeypatch):
    model = tiny_memgen(trigger=trigger, reads=reads)
    places: dict[tuple[int, int], list] = {}
    original = StaticStep.compute

    def compute(self, lines, slots):
        with no_host_reads(), Recorder() as recorder:
            original(self, lines, slots)
        tensors = [self.inputs, self.outputs, self.states, *backbone_tensors(model, self)]
        shapes = [
            (str(func), [tuple(t.shape) for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)])
            for func, args, _, result in recorder.calls
        ]
        places.setdefault((lines, slots), []).append(([t.data_ptr() for t in tensors], shapes))

    monkeypatch.setattr(StaticStep, "compute", compute)
    generate(
        model,
        random_rows(LENGTHS),
        replace(DRAWN, static_step="on"),
        stop=lambda tokens: tokens[-1] % 23 == 0,
    )
    assert len(places) > 2
    assert len({lines for lines, _ in places}) > 1
    assert max(len(found) for found in places.values()) > 2
    for found in places.values():
        assert all(place == found[0] for place in found)
    buffers = [found[0][0] for found in places.values()]
    assert all(pointers == buffers[0] for pointers in buffers)


def backbone_tensors(model, step) -> list[torch.Tensor]:
    """The cache's buffers and the angles."""
    cache = step.cache
    return [*cache._keys.values(), *cache._values.values(), *model.reasoner.backbone.recordable()]


@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_the_host_waits_once_per_step_and_once_more_where_latents_are_read(trigger, reads, monkeypatch):
    model = tiny_memgen(trigger=trigger, reads=reads)
    learned = trigger in ("tokens", "hidden_states")
    # A constant trigger answers on the host: its numbers, alone in a call, are not waited for.
    constant = not learned and reads == "embeddings"
    generate(model, [[65]], GREEDY)  # A base finds out once how it can be computed.
    reader, waits, ends = Reads(), [], []
    original = state.to_host

    def numbers(*parts):
        if not constant or len(parts) > 1:
            waits.append(len(parts))
        begin = len(reader.seen)
        found = original(*parts)
        del reader.seen[begin:]
        return found

    monkeypatch.setattr(step_module, "to_host", numbers)

    def observe(row, token):
        if token is not None:
            ends.append((len(reader.seen), len(waits)))

    with reader:
        generation = generate(model, random_rows(LENGTHS), replace(DRAWN, static_step="on"), observe=observe)
    # From the first token, behind the prompt, to the last: then the result is put together, on the host.
    (first, waits_before), (last, waits_then) = ends[0], ends[-1]
    assert reader.seen[first:last] == []
    steps = max(generation.lengths) - 1
    assert inserting_steps(generation) > 0 or trigger == "never"
    extra = inserting_steps(generation) if learned or reads == "hidden_states" else 0
    assert waits_then - waits_before == steps + extra


# Kept between calls


@pytest.fixture
def recorded(monkeypatch):
    """Recordings as a GPU makes them, on the CPU: the sizes recorded, in order, and how often one was replayed."""
    found: list[list] = [[], []]

    class Recording:
        def __init__(self, step, size):
            self.step, self.size = step, size

        def replay(self):
            found[1].append(self.size)
            self.step.compute(self.size[0], self.size[1])

    def record(self, size):
        found[0].append(size)
        self._graphs[size] = Recording(self, size)

    begin = StaticStep.begin

    def begin_and_record(self, *arguments):
        begin(self, *arguments)
        self._records = True

    monkeypatch.setattr(StaticStep, "_record", record)
    monkeypatch.setattr(StaticStep, "begin", begin_and_record)
    monkeypatch.setattr(static_step, "WARM_UP", 2)
    return found


@pytest.mark.parametrize("group_size", [1, 2])
def test_recordings_are_made_once_for_all_calls(recorded, group_size):
    model = tiny_memgen(delimiters=("z",))
    # Two samplings take turns, as training and evaluation do; prompts differ.
    for number in range(6):
        settings = replace((DRAWN, GREEDY)[number % 2], group_size=group_size)
        static, dynamic = both(model, random_rows([9, 20 - number, 4], seed=number), settings)
        assert_same(model, static, dynamic)
        if number == 1:
            first = list(recorded[0])
    assert len(first) == len(set(first)) > 2
    assert recorded[0] == first
    assert len(recorded[1]) > 3 * len(first)
    (kept,) = static_step._kept[model.reasoner]
    assert kept.cache.rows == 3 * group_size


def test_a_kept_cache_that_holds_anything_changes_nothing():
    model = tiny_memgen()
    static, dynamic = both(model, random_rows(LENGTHS), DRAWN)
    (step,) = static_step._kept[model.reasoner]
    for buffer in (*step.cache._keys.values(), *step.cache._values.values()):
        buffer.fill_(torch.nan)
    # Fewer and shorter rows than those that it was made for.
    assert_same(model, *both(model, random_rows(LENGTHS[:3]), DRAWN))
    assert static_step._kept[model.reasoner] == [step]
    again, _ = both(model, random_rows(LENGTHS), DRAWN)
    assert again.answers() == static.answers() == dynamic.answers()


def test_what_was_recorded_on_weights_that_have_moved_is_not_used_again(recorded):
    model = tiny_memgen(delimiters=("z",))
    both(model, random_rows(LENGTHS), DRAWN)
    (step,) = static_step._kept[model.reasoner]
    for parameter in model.weaver.own_parameters().values():
        parameter.data = parameter.data.clone()  # Adapters are not part of it.
    both(model, random_rows(LENGTHS), DRAWN)
    assert static_step._kept[model.reasoner] == [step]
    weight = model.reasoner.backbone.model.model.layers[0].mlp.up_proj.weight
    weight.data = -weight.data
    assert_same(model, *both(model, random_rows(LENGTHS), DRAWN))
    (other,) = static_step._kept[model.reasoner]
    assert other is not step


def test_an_adapter_of_the_reasoner_may_change_where_it_lies_but_not_move(recorded):
    model = tiny_memgen(source="lora", prompt_latents=0, inference_latents=0, trigger="never")
    before, _ = both(model, random_rows(LENGTHS), DRAWN)
    (step,) = static_step._kept[model.reasoner]
    with torch.no_grad():
        for parameter in model.weaver.own_parameters().values():
            parameter.mul_(3.0)  # As an optimizer's step does.
    static, dynamic = both(model, random_rows(LENGTHS), DRAWN)
    assert_same(model, static, dynamic)
    assert static.answers() != before.answers()
    assert static_step._kept[model.reasoner] == [step]
    for parameter in model.weaver.own_parameters().values():
        parameter.data = parameter.data * -1.0
    assert_same(model, *both(model, random_rows(LENGTHS), DRAWN))
    assert step not in static_step._kept[model.reasoner]


def test_a_call_inside_a_call_has_storage_of_its_own():
    model = tiny_memgen()
    static, _ = both(model, random_rows(LENGTHS), DRAWN)
    inner = []

    def observe(row, token):
        if row == 0 and len(inner) < 2:
            inner.append(generate(model, random_rows(LENGTHS, 1), replace(DRAWN, static_step="on")))

    outer = generate(model, random_rows(LENGTHS), replace(DRAWN, static_step="on"), observe=observe)
    assert outer.answers() == static.answers()
    assert (
        inner[0].answers() == inner[1].answers() == both(model, random_rows(LENGTHS, 1), DRAWN)[1].answers()
    )
    assert len(static_step._kept[model.reasoner]) == static_step.KEPT


def test_calls_in_and_outside_of_inference_mode_may_share_a_step():
    model = tiny_memgen()
    found = []
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            found.append(generate(model, random_rows(LENGTHS), replace(DRAWN, static_step="on")).answers())
    assert found[0] == found[1] == found[2]
    assert len(static_step._kept[model.reasoner]) == 1


def test_what_is_kept_keeps_no_model_alive():
    model = tiny_memgen()
    generate(model, random_rows(LENGTHS), replace(DRAWN, static_step="on"))
    gone = weakref.ref(model.reasoner)
    assert gone() in static_step._kept
    del model
    gc.collect()
    assert gone() is None


def test_numbers_of_several_kinds_come_to_the_host_in_one_copy():
    parts = [torch.tensor([2**40 + 1, 7]), torch.tensor([0.1, -3.0]), torch.zeros(0), torch.tensor([0.3])]
    with Reads() as reader:
        ours = state._one_copy(parts)
    assert [name for name, _ in reader.seen] == ["tolist"]
    assert ours == [part.tolist() for part in parts]
    assert state.to_host(*parts) == ours


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_recorded_steps_give_the_ragged_engines_answers(trigger, reads, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    recorded = []
    original = StaticStep._record

    def record(self, size):
        original(self, size)
        recorded.append(size in self._graphs)

    monkeypatch.setattr(StaticStep, "_record", record)
    monkeypatch.setattr(static_step, "WARM_UP", 1)
    model = tiny_memgen(trigger=trigger, reads=reads).to("cuda")
    static, dynamic = both(model, random_rows(LENGTHS), DRAWN, stop=lambda tokens: tokens[-1] % 23 == 0)
    assert_same(model, static, dynamic)
    assert recorded
    assert all(recorded)


@pytest.mark.gpu
def test_on_a_gpu_a_second_call_replays_what_the_first_has_recorded(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    recorded = []
    original = StaticStep._record
    monkeypatch.setattr(StaticStep, "_record", lambda *a: recorded.append(1) or original(*a))
    monkeypatch.setattr(static_step, "WARM_UP", 1)
    model = tiny_memgen(delimiters=("z",)).to("cuda")
    for seed in range(3):
        static, dynamic = both(model, random_rows([9, 12, 4], seed=seed), DRAWN)
        assert_same(model, static, dynamic)
        if seed == 0:
            first = len(recorded)
    assert len(recorded) == first > 0


@pytest.mark.gpu
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_gpu_is_waited_for_once_per_step_and_once_more_where_latents_are_read(trigger, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    model = tiny_memgen(trigger=trigger).to("cuda")
    prompts = random_rows(LENGTHS)
    generate(model, prompts, DRAWN)
    monkeypatch.setattr(static_step, "WARM_UP", 10**9)  # Recording waits.
    waits: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def observe(row, token):
            if row == 0 and token is not None:
                waits.append(sum("synchronizing" in str(warning.message) for warning in caught))

        torch.cuda.set_sync_debug_mode("warn")
        try:
            generation = generate(model, prompts, DRAWN, observe=observe)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    learned = trigger in ("tokens", "hidden_states")
    extra = inserting_steps(generation) if learned else 0
    # From row 0's first token, behind the prompt, to its last.
    assert 0 < waits[-1] - waits[0] <= len(waits) - 1 + extra
