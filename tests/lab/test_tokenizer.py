import pytest
from transformers import AutoTokenizer

from memgen.chat import conversation_ids, end_of_turn_id, prompt_ids
from memgen.lab.documents import words
from memgen.lab.tokenizer import VOCABULARY, lab_tokenizer
from memgen.lab.world import World, bill_problems, sample_problems, shop_problems


@pytest.fixture(scope="module")
def tokenizer():
    return lab_tokenizer()


def problems():
    skills = [p for task in ("open", "add", "rev", "walk") for p in sample_problems(task, "train", 20)]
    return [*shop_problems(World(0), "val")[:50], *bill_problems(World(0), "val", 50), *skills]


def test_texts_come_back_as_they_were(tokenizer):
    for problem in problems():
        for text in (problem.prompt, problem.solution, problem.prompt + problem.solution):
            assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_word_is_one_token(tokenizer):
    for problem in problems():
        text = problem.prompt + problem.solution
        assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == words(text)


def test_prompt_and_solution_tokenise_apart_as_together(tokenizer):
    for problem in problems():
        apart = tokenizer(problem.prompt).input_ids + tokenizer(problem.solution).input_ids
        assert tokenizer(problem.prompt + problem.solution).input_ids == apart


@pytest.mark.parametrize("delimiter", [",", ".", "\n"])
def test_a_delimiters_token_decodes_to_text_that_ends_in_it(tokenizer, delimiter):
    (token,) = tokenizer(delimiter).input_ids
    assert tokenizer.decode([token]).endswith(delimiter)


def test_no_unknown_token_occurs_in_the_labs_texts(tokenizer):
    for problem in problems():
        assert tokenizer.unk_token_id not in tokenizer(problem.prompt + problem.solution).input_ids


def test_the_chat_template_concatenates_and_closes_the_assistants_turn(tokenizer):
    problem = problems()[0]
    user = {"role": "user", "content": problem.prompt}
    prompt = prompt_ids(tokenizer, [user])
    whole = conversation_ids(tokenizer, [user, {"role": "assistant", "content": problem.solution}])
    assert prompt == tokenizer(problem.prompt).input_ids
    assert whole.ids == [*prompt, *tokenizer(problem.solution).input_ids, tokenizer.eos_token_id]
    assert whole.turns == ((len(prompt), len(whole.ids)),)
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id


def test_special_tokens_differ(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert len(tokenizer) == len(VOCABULARY) == len(set(VOCABULARY))


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for problem in problems():
        ids = tokenizer(problem.prompt).input_ids
        assert loaded(problem.prompt).input_ids == ids
        assert loaded.decode(ids) == problem.prompt
