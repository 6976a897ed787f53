"""The composer: a weaver that reads what a text memory finds, and forgets it again."""

from __future__ import annotations

import pytest
import torch

from experiences import experience
from generations import logprobs
from memgen.generation.composer import Composer
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.memories.exp_rag import ExpRAG
from memgen.memories.raw_trajectories import RawTrajectories, RawTrajectoriesSettings
from memgen.model.cache import PackedKVCache
from memgen.training.checkpoint import load_checkpoint, save_checkpoint
from memgen.types import InsertionKind, InsertionPlan, TokenBatch
from tiny import byte_tokenizer, tiny_memgen
from tolerance import assert_close

PROMPT = InsertionKind.PROMPT
KIND = "memgen.generation.composer.Composer"
TOKENIZER = byte_tokenizer()
DRAWN = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=5)
TASKS = ["bring fig to nut", "open the red door", "sing"]
PROMPTS = [TOKENIZER.encode(f"now {task} again") for task in ("bring tea", "open the door", "dance")]
"""The first two share words with a task in memory, the third with none."""


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "memory.sqlite")


def written(path, action: str = "take it"):
    with RawTrajectories(path) as memory:
        for task in TASKS:
            memory.write(experience(task, [action, "put it"], observations=["done"]))
    return path


def composer(file, **settings):
    arguments = {"memory": str(file)} | settings.pop("arguments", {})
    return tiny_memgen(source=KIND, arguments=arguments, **settings)


def replayed(model, generation):
    with torch.no_grad():
        return model.label_logprobs(generation.as_batch(), generation.plan)


def test_it_reads_the_trajectory_of_the_most_similar_task(file):
    source = composer(file).weaver
    assert isinstance(source, Composer)
    assert TOKENIZER.decode(source.retrieved(PROMPTS[0])) == "bring fig to nut\ntake it\ndone\nput it"
    assert TOKENIZER.decode(source.retrieved(PROMPTS[1])).startswith("open the red door")
    assert source.retrieved(PROMPTS[2]) == []


def test_decoding_then_replaying_its_plan_gives_the_same_logprobs(file):
    model = composer(file)
    generation = generate(model, PROMPTS, DRAWN)
    assert any(count > 1 for count in generation.plan.counts)
    ours, woven = replayed(model, generation)
    for row, part in enumerate(ours.split(generation.lengths)):
        assert_close(f"row {row}", part, logprobs(generation, row))
    read = 0
    for turn in generation.turns:
        text, before = turn.context + turn.tokens, 0
        for point, kind in turn.insertions:
            size = model.weaver.config.latents(InsertionKind(kind))
            read += size + len(model.weaver.retrieved(text[:point]))
        last = turn.insertions[-1][0]
        before = sum(model.weaver.config.latents(InsertionKind(kind)) for _, kind in turn.insertions[:-1])
        read += last + before
    assert generation.work.weaver_positions == read
    # The replay does not weave for what lies behind the last token that is scored.
    assert woven.work.weaver_positions <= read


def test_without_a_hit_it_is_the_plain_weaver_bit_for_bit(tmp_path):
    with RawTrajectories(tmp_path / "empty.sqlite"):
        pass
    model, plain = composer(tmp_path / "empty.sqlite"), tiny_memgen()
    ours, theirs = (generate(m, PROMPTS, DRAWN, keep_latents=True) for m in (model, plain))
    assert ours.answers() == theirs.answers()
    assert ours.work == theirs.work
    for blocks, others in zip(ours.latents, theirs.latents, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(blocks, others, strict=True))
    assert torch.equal(replayed(model, ours)[0], replayed(plain, theirs)[0])


def test_other_trajectories_give_other_latents_where_there_was_a_hit(file, tmp_path):
    other = written(tmp_path / "other.sqlite", action="leave it")
    one, two = (generate(composer(path, cap=0), PROMPTS, DRAWN, keep_latents=True) for path in (file, other))
    differ = [float((a[0] - b[0]).abs().max()) for a, b in zip(one.latents, two.latents, strict=True)]
    assert min(differ[:2]) > 0.01
    assert_close("without a hit", one.latents[2][0], two.latents[2][0])


def test_it_searches_once_for_each_text_and_never_where_nothing_is_inserted(file):
    model = composer(file, cap=0)
    generate(model, PROMPTS, DRAWN)
    assert model.weaver.memory.retrievals == 3
    generate(model, [*PROMPTS, TOKENIZER.encode("sing along")], DRAWN)
    assert model.weaver.memory.retrievals == 4
    never = composer(file, trigger="never")
    generate(never, PROMPTS, DRAWN)
    assert never.weaver.memory.retrievals == 0


def test_a_memory_that_has_learnt_is_searched_again(file):
    source = composer(file).weaver
    assert source.retrieved(PROMPTS[2]) == []
    source.memory.write(experience("dance slowly", ["turn"]))
    assert TOKENIZER.decode(source.retrieved(PROMPTS[2])) == "dance slowly\nturn"


def test_what_was_retrieved_is_forgotten_with_the_queries(file):
    plain = tiny_memgen().weaver
    generator = torch.Generator().manual_seed(0)
    first, second, snippet = (torch.randn(n, 32, generator=generator) for n in (5, 3, 7))
    found = []
    for snippets in (None, [snippet]):
        cache = PackedKVCache(1, torch.device("cpu"))
        one = plain.weave(first, [5], [PROMPT], [0], cache, snippets=snippets)
        assert cache.length(0) == 5
        found.append((one, plain.weave(second, [3], [PROMPT], [0], cache)))
    assert not torch.equal(found[0][0], found[1][0])
    assert_close("the next latents", found[1][1], found[0][1])
    # Behind the new positions and in front of the queries.
    whole = plain.weave(
        torch.cat([first, snippet]), [12], [PROMPT], [0], PackedKVCache(1, torch.device("cpu"))
    )
    assert_close("latents", found[1][0], whole)


def test_gradients_reach_the_composer_alone(file):
    model = composer(file)
    model.train_only(model.weaver)
    batch = TokenBatch.from_rows([PROMPTS[0]], [[False] * 8 + [True] * (len(PROMPTS[0]) - 8)])
    model.label_logprobs(batch, InsertionPlan([[(8, 0), (12, 1)]]))[0].sum().backward()
    moved = {id(p) for p in model.parameters() if p.grad is not None}
    assert moved == {id(p) for p in model.weaver.own_parameters().values()}
    assert model.reasoner.backbone.embedding.grad is None


def test_a_checkpoint_keeps_it_and_may_be_used_with_another_memory(file, tmp_path):
    model = composer(file)
    save_checkpoint(model, model.config, tmp_path / "saved", with_trigger=False)
    again = composer(written(tmp_path / "moved.sqlite"), trained=False)
    load_checkpoint(again, tmp_path / "saved")
    for name, tensor in model.weaver.own_parameters().items():
        assert torch.equal(again.weaver.own_parameters()[name], tensor)
    assert not again.weaver.is_untrained()


def test_trajectories_are_read_whole_within_the_budget(file):
    length = len(TOKENIZER.encode("bring fig to nut\ntake it\ndone\nput it"))
    assert composer(file, arguments={"budget": length - 1}).weaver.retrieved(PROMPTS[0]) == []
    assert len(composer(file, arguments={"budget": length}).weaver.retrieved(PROMPTS[0])) == length


def test_a_trajectory_of_the_task_itself_is_left_out_unless_it_is_wanted(tmp_path):
    with RawTrajectories(written(tmp_path / "one.sqlite")) as memory:
        memory.write(experience("bring fig to tea", ["go"]))
        assert [p.text[:16] for p in memory.read("now: bring fig\nto nut !")] == ["bring fig to tea"]
    settings = RawTrajectoriesSettings(k=2, same_task=True)
    with RawTrajectories(tmp_path / "two.sqlite", settings) as memory:
        for task in TASKS:
            memory.write(experience(task, ["go"]))
        assert memory.read("now bring fig to nut")[0].text == "bring fig to nut\ngo"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"memory": None}, ValueError, r"set model\.memgen\.weaver\.arguments\.memory"),
        ({"memory": "no/such.sqlite"}, FileNotFoundError, r"no file no/such\.sqlite .*arguments\.memory"),
        ({"budget": 0}, ValueError, r"arguments\.budget must be at least 1, got 0"),
        ({"pasages": 2}, ValueError, r"do not fit weaver\.kind .*pasages"),
        ({"method": "memgen.memories.exp_rag.ExpRAG"}, ValueError, r"method"),
        (
            {"method": "no.such.Memory"},
            ValueError,
            r"arguments\.method 'no\.such\.Memory' cannot be imported",
        ),
        ({"method": "torch.nn.Linear"}, ValueError, r"is no memgen\.memories\.base\.TextMemory"),
        ({"constants": {"k": 3}}, ValueError, r"k"),
    ],
)
def test_settings_that_fit_no_memory_are_refused(file, arguments, error, message):
    with pytest.raises(error, match=message):
        composer(file, arguments=arguments)


def test_a_composer_of_hidden_states_is_refused(file):
    with pytest.raises(ValueError, match=r"set model\.memgen\.weaver\.reads to embeddings"):
        composer(file, reads="hidden_states")


def test_another_method_of_memory_serves_too(tmp_path):
    with ExpRAG(tmp_path / "rag.sqlite") as memory:
        memory.write(experience("bring fig to nut", ["go"]))
    source = composer(tmp_path / "rag.sqlite", arguments={"method": "memgen.memories.exp_rag.ExpRAG"}).weaver
    assert TOKENIZER.decode(source.retrieved(PROMPTS[0])).startswith("Task: bring fig to nut\nOutput: go")


def test_a_stream_that_is_too_long_with_what_was_retrieved_is_refused(file):
    model = composer(file, max_position_embeddings=64)
    long = TOKENIZER.encode("now bring tea again and again and again")
    with pytest.raises(ValueError, match=r"context of the weaver's base is 64; lower .*arguments\.budget"):
        generate(model, [long], GenerationSettings(max_new_tokens=1))
