"""lm-eval and inspect-ai against the server, each in its own environment: their scores are those of `memgen test`."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harnesses import gsm8k
from memgen.api.agent import Agent
from memgen.chat import CHATML, ChatTemplate, prompt_ids
from memgen.environments.qa.gsm8k import GSM8K
from memgen.environments.qa.maths import PROMPT
from memgen.model.backbone import Backbone
from memgen.model.memgen import MemGenModel
from memgen.training.checkpoint import TextSettings
from serving_tiny import serving
from tiny import byte_tokenizer, tiny_causal_lm, tiny_memgen

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "benchmarks" / "harnesses"
BIN = Path(os.environ.get("MEMGEN_HARNESSES", Path(sys.prefix) / "harnesses")) / "bin"
END = 258


def needs_harnesses(test):
    there = (BIN / "lm-eval").exists() and (BIN / "inspect").exists()
    return pytest.mark.harness(pytest.mark.skipif(not there, reason="make setup-harnesses")(test))


def item(first, second):
    """Two answers of three are 7."""
    answer = 7 if (first + second) % 3 else first
    return {"question": f"{first} and {second}?", "answer": f"It is {answer}.\n#### {answer}"}


ITEMS = [item(first, second) for first in range(3) for second in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Items in GSM8K's form."""
    folder = tmp_path_factory.mktemp("gsm8k")
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in ITEMS))
    return folder


@pytest.fixture(scope="module")
def agent():
    """A tiny agent that has learnt to answer in a box, and what most items' answer is; it weaves latents in."""
    tokenizer = byte_tokenizer()
    template = ChatTemplate(CHATML)
    rows, labels = [], []
    for record in ITEMS[:6]:
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": gsm8k.prompt(record)}], template)
        answer = [*tokenizer.encode("\\boxed{7}"), END]
        rows.append(prompt + answer)
        labels.append([-100] * (len(prompt) + 1) + answer)
        start = len(prompt)
    base, draw = tiny_causal_lm(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(base.parameters(), lr=0.01)
    for _ in range(30):
        # Something stands where latents will.
        read = base.get_input_embeddings()(torch.tensor(rows))
        latent = torch.randn(len(rows), 1, read.shape[-1], generator=draw)
        read = torch.cat([read[:, :start], latent, read[:, start:]], dim=1)
        loss = base(inputs_embeds=read, labels=torch.tensor(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    config = tiny_memgen(prompt_latents=1, inference_latents=0).config
    model = MemGenModel.assemble(config, Backbone(base.eval(), "tiny"), tokenizer).eval()
    return Agent(model, model.config, tokenizer, TextSettings(CHATML, model.reasoner.end_ids))


@pytest.fixture(scope="module")
def expected(agent, folder):
    """The agent's answers, and their rewards as `memgen test` gives them."""
    with_rewards = GSM8K(str(folder))
    examples = with_rewards.examples("test")
    answers = [agent.generate(with_rewards.messages(example), max_new_tokens=16) for example in examples]
    rewards = with_rewards.rewards(examples, [answer.text for answer in answers])
    return [answer.text for answer in answers], [reward.total for reward in rewards]


def run(folder, program, *arguments, cwd=None, **environment):
    """Runs a harness in a folder, without the core's packages and without a hub."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MEMGEN"))}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [BIN / program, *arguments],
        cwd=cwd or folder,
        env={**clean, **offline, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_prompt_of_the_harness_tasks_is_memgens():
    assert gsm8k.PROMPT == PROMPT


def test_the_harness_tasks_grade_as_memgen_test_does(tmp_path):
    references = ["7", "1,024"]
    records = [{"question": f"How many? {number}", "answer": f"#### {number}"} for number in references]
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    environment = GSM8K(str(tmp_path))
    numbers = ["\\boxed{7}", "\\boxed{3}, no, \\boxed{ 1,024 }", "#### 7", "\\boxed{$7.00}"]
    answers = [*numbers, "7", "", "\\boxed{}", "\\boxed{7", "#### seven hundred"]
    pairs = list(itertools.product(environment.examples("test"), answers))
    rewards = environment.rewards(*map(list, zip(*pairs, strict=True)))
    graded = [
        gsm8k.correct(answer, records[references.index(example.answer)]["answer"])
        for example, answer in pairs
    ]
    assert graded == [reward.total == 1.0 for reward in rewards]
    assert sum(graded) == 4


@needs_harnesses
def test_lm_eval_generates_the_agents_answers_and_gets_the_score_of_memgen_test(agent, folder, expected):
    texts, rewards = expected
    assert 0 < sum(rewards) < len(rewards)
    with serving(agent) as client:
        run(
            folder, "lm-eval", "run", "--model", "local-chat-completions", "--model_args",
            f"base_url=http://127.0.0.1:{client.port}/v1/chat/completions,model=tiny,num_concurrent=4,tokenized_requests=False",
            "--apply_chat_template", "--include_path", str(TASKS), "--tasks", "memgen_gsm8k",
            "--gen_kwargs", "max_gen_toks=16", "--output_path", "out", "--log_samples", OPENAI_API_KEY="none",
        )  # fmt: skip
    (samples,) = folder.glob("out/**/samples_*.jsonl")
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in found] == texts
    assert [sample["correct"] for sample in found] == rewards
    (results,) = folder.glob("out/**/results_*.json")
    score = json.loads(results.read_text())["results"]["memgen_gsm8k"]["correct,none"]
    assert score == pytest.approx(sum(rewards) / len(rewards))


@needs_harnesses
def test_inspect_gets_the_agents_answers_and_the_score_of_memgen_test(agent, folder, expected):
    texts, rewards = expected
    with serving(agent) as client:
        run(
            folder, "inspect", "eval", "benchmarks/harnesses/gsm8k_inspect.py", "--model", "openai-api/memgen/tiny",
            "-T", f"path={folder / 'test.jsonl'}", "--temperature", "0", "--max-tokens", "16", "--log-format", "json",
            "--log-dir", str(folder / "inspect"), "--display", "none", cwd=ROOT,
            MEMGEN_BASE_URL=f"http://127.0.0.1:{client.port}/v1", MEMGEN_API_KEY="none",
        )  # fmt: skip
    (log,) = (folder / "inspect").glob("*.json")
    found = json.loads(log.read_text())
    samples = sorted(found["samples"], key=lambda sample: sample["id"])
    assert [sample["output"]["completion"] for sample in samples] == texts
    assert [sample["scores"]["same_number"]["value"] for sample in samples] == rewards
    (score,) = found["results"]["scores"]
    assert score["metrics"]["accuracy"]["value"] == pytest.approx(sum(rewards) / len(rewards))
