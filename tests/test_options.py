"""What is asked for: names and arguments of ours, and those of Unsloth's."""

import inspect
from pathlib import Path

import pytest
from models import tokenizer

from merge_callback import MergeOnSaveCallback, MergeRefused, merge_adapter
from merge_callback.migration import FOR_CALLBACK, FOR_MERGE_ADAPTER
from merge_callback.options import MergeOptions

CALLS = {
    "callback": (lambda *given, **named: MergeOnSaveCallback("out", *given, **named), FOR_CALLBACK),
    "merge_adapter": (
        lambda *given, **named: merge_adapter(None, "out", *given, **named),
        FOR_MERGE_ADAPTER,
    ),
}
PAGE = Path(__file__).resolve().parents[1] / "docs/how-to/unsloth.md"
OURS = {"callback": MergeOnSaveCallback, "merge_adapter": merge_adapter}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("merged_16bit", "merged_16bit"),
        ("merged_4bit", "merged_4bit"),
        ("merged_4bit_forced", "merged_4bit"),
        ("forced_merged_4bit", "merged_4bit"),
        ("lora", "lora"),
        ("Merged 16bit", "merged_16bit"),
        ("merged-4bit-forced", "merged_4bit"),
        ("FORCED merged-4bit", "merged_4bit"),
        (" LoRA ", "lora"),
    ],
)
def test_a_save_method_has_the_names_and_spellings_of_unsloth(theirs, ours):
    assert MergeOptions(save_method=theirs).methods(base_is_4bit=True) == (ours,)
    both = MergeOptions(save_method=[theirs, ours, "lora"]).methods(base_is_4bit=False)
    assert both == tuple(dict.fromkeys([ours, "lora"]))


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "q4_k_m", "merged", "4bit"])
def test_a_save_method_that_means_nothing_here_is_refused_with_those_that_do(name):
    with pytest.raises(MergeRefused) as caught:
        MergeOptions(save_method=name)
    known = "'merged_4bit', 'merged_16bit', 'lora'"
    assert caught.value.problems == (f"save_method {name!r} is not known; use one of {known}",)


@pytest.mark.parametrize("where", CALLS)
def test_an_argument_of_unsloth_is_refused_with_the_name_of_ours(where):
    call, theirs = CALLS[where]
    with pytest.raises(MergeRefused) as caught:
        call(**dict.fromkeys(theirs), rounding="nearest")
    told = [f"{name} is an argument of Unsloth's; {cure}" for name, cure in theirs.items()]
    assert list(caught.value.problems) == told


@pytest.mark.parametrize("where", CALLS)
def test_each_cure_names_an_argument_that_there_is(where):
    _, theirs = CALLS[where]
    parameters = inspect.signature(OURS[where]).parameters
    assert not theirs.keys() & parameters.keys()
    for cure in theirs.values():
        if cure.startswith("use ") and not cure.startswith("use push_version"):
            assert cure.split()[1].split("=")[0].strip(",;") in parameters, cure


def test_a_tokenizer_without_its_name_is_refused_with_the_name(tmp_path):
    words = tokenizer()
    with pytest.raises(MergeRefused) as caught:
        merge_adapter(None, tmp_path, words, save_method="merged_16bit", token="hf")
    assert caught.value.problems == (
        "token is an argument of Unsloth's; use push_version(token=)",
        "what comes after output_dir needs its name; tokenizer: use processing_class",
    )
    with pytest.raises(MergeRefused, match="after output_dir needs its name; tokenizer: leave it"):
        MergeOnSaveCallback(tmp_path, words)


def test_what_nobody_knows_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'rouding'"):
        MergeOnSaveCallback(rouding="nearest")
    with pytest.raises(TypeError, match="unexpected keyword argument 'rouding'"):
        merge_adapter(None, "out", rouding="nearest")


def test_the_page_on_unsloth_answers_every_argument():
    page = PAGE.read_text()
    for name in FOR_CALLBACK | FOR_MERGE_ADAPTER:
        cures = (known.get(name, "the same") for known in (FOR_CALLBACK, FOR_MERGE_ADAPTER))
        assert f"| `{name}` | {' | '.join(cures)} |" in page
