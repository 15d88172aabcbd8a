"""Records of Alpaca's format become prompts and answers, and token ids that tell them apart."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megagrow.data.sft import Example, prompt_of, read_examples, tokenize
from megagrow.data.tokenizers import load_tokenizer
from megagrow.errors import InputError
from tests.helpers.alpaca import records, tokenizer, write_alpaca

LENGTH = 512


def test_the_template_is_that_of_stanford_alpaca():
    assert prompt_of("Add {1} to it.", "2\n") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nAdd {1} to it.\n\n### Input:\n2\n\n\n### Response:"
    )
    assert prompt_of("Say {hello}.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay {hello}.\n\n### Response:"
    )


@pytest.mark.parametrize("name", ["all.json", "all.jsonl", "all.NDJSON"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_list_and_lines_hold_the_same_examples(tmp_path, name, bom):
    made = [*records(5), {"instruction": "Go.", "output": "", "text": "not looked at"}]
    path = write_alpaca(tmp_path / name, made)
    path.write_bytes(bom + path.read_bytes())
    found = list(read_examples(path))
    assert found == [Example(prompt_of(r["instruction"], r.get("input", "")), r["output"])
                     for r in made]  # fmt: skip


def test_tokens_are_prompt_answer_and_one_eos(tmp_path):
    loaded = load_tokenizer(tokenizer(tmp_path))
    for example in read_examples(write_alpaca(tmp_path / "a.json", records(20))):
        whole = tokenize(loaded, example)
        assert whole.ids[-1] == loaded.eos_id and loaded.eos_id not in whole.ids[:-1]
        assert loaded.decode(whole.ids[: whole.prompt]) == example.prompt
        assert loaded.decode(whole.ids[whole.prompt : -1]) == example.answer


def byte_tokenizer(folder):
    """A tokenizer of transformers with some merges, one of them over the end of a prompt."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "</s>", "in", "io", ":Y"])}
    bpe = Tokenizer(models.BPE(vocab, [("i", "n"), ("i", "o"), (":", "Y")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    theirs = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    theirs.save_pretrained(folder)
    return theirs


def stanford(theirs, example):
    """ids and labels (-100 on the prompt) as train.py of Stanford Alpaca makes them."""
    text = example.prompt + example.answer + theirs.eos_token
    found = [
        theirs(part, return_tensors="pt", truncation=True, max_length=LENGTH).input_ids[0]
        for part in (text, example.prompt)
    ]
    labels = found[0].clone()
    labels[: len(found[1])] = -100
    return found[0], labels


@pytest.mark.parametrize("answer", ["Yes, in it.", "No", "", ":Y"])
def test_labels_are_those_of_transformers(tmp_path, answer):
    theirs, ours = byte_tokenizer(tmp_path), load_tokenizer(tmp_path)
    example = Example(prompt_of("Is it in?", ""), answer)
    ids, labels = stanford(theirs, example)
    whole = tokenize(ours, example)
    assert whole.ids == ids.tolist()
    mine = torch.tensor(whole.ids)
    mine[: whole.prompt] = -100
    assert mine.tolist() == labels.tolist()
    assert labels[-1] == ours.eos_id


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"instruction": "x"}', "a.json: not a JSON list of records"),
        ("a.json", "[{]", "a.json: not JSON"),
        ("a.json", "[3]", "a.json: record 1: not an object"),
        ("a.json", '[{"instruction": "x", "output": "y"}, {"instruction": "x"}]',
         "a.json: record 2: no text under the key 'output'"),
        ("a.json", '[{"instruction": " ", "output": "y"}]', "record 1: the instruction is empty"),
        ("a.json", '[{"instruction": "x", "input": 3, "output": "y"}]', "under the key 'input'"),
        ("a.json", '[{"instruction": "\\ud800", "output": "y"}]', "a.json: not JSON"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n\nno', "a.jsonl: line 3: not JSON"),
        ("a.jsonl", '{"text": "x"}', "a.jsonl: line 1: no text under the key 'instruction'"),
    ],
)  # fmt: skip
def test_what_is_no_alpaca_file_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        list(read_examples(tmp_path / name))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: No such file"):
        list(read_examples(tmp_path / "none.json"))
