"""What transformers can build merges, or is refused when the merge is planned."""

import pairs
import pytest
import support as tables
import torch
from pairs import BASES, in_child
from safetensors.torch import load_file, save_file
from shrink import MAPPINGS, NOT_TRIED, save_small

pytestmark = pytest.mark.matrix

SAMPLE = {  # of all kinds: tied, fused, converted, of experts, state spaces, encoders and images
    "causal": """llama qwen3 gemma2 gpt2 gpt_neox bloom phi3 deepseek_v3 mixtral gpt_oss
        granitemoehybrid mamba2 zamba2 jamba qwen3_next bart xglm""",
    "image-text": """llava qwen2_vl gemma3 mllama idefics3 florence2 blip-2 got_ocr2""",
}
TITLES = dict(zip(SAMPLE, tables.PAIRS, strict=True))
PAIRS = [
    pytest.param(
        task, name, kind, id=f"{task}-{name}-{kind}",
        marks=[] if name in SAMPLE[task].split() else pytest.mark.every,
    )
    for task, names in MAPPINGS.items() for name in names for kind in BASES
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task, name, kind", PAIRS)
def test_an_architecture_merges_or_is_refused_when_planned(tmp_path, task, name, kind, support):
    support(TITLES[task], name, kind)
    if name in NOT_TRIED:
        support.found(f"not tried: {NOT_TRIED[name]}")
        return
    told = in_child(task, name, kind, tmp_path)
    assert not told.startswith("wrong"), told
    support.found(told)


@pytest.fixture
def llama(tmp_path):
    """A base that stands for a merge which dropped the adapter, and the live model."""
    base = pairs.Base("causal", tmp_path / "base", "bfloat16")
    save_small("causal", "llama", base.path)
    return base, pairs.adapted(base, "llama")[0]


@pytest.mark.filterwarnings("ignore")
def test_the_checks_of_a_pair_see_that_the_adapter_was_dropped(tmp_path, llama):
    base, live = llama
    with pytest.raises(AssertionError, match=r"values are not base \+ adapter"):
        pairs.check_values(base, live, base.path, {})
    held = pairs.rows("llama", 2, seed=9)
    with pytest.raises(AssertionError, match="16 bits: off by 1 of the effect"):
        pairs.check_outputs(base, live, {"merged_16bit": base.path}, {}, held, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", ["a name", "a dtype", "a value"])
def test_the_checks_of_a_pair_see_a_tensor_that_is_not_the_base_s(tmp_path, llama, change):
    base, live = llama
    path = pairs.merge_adapter(live, tmp_path / "out", progress=False).path
    file = path / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    if change == "a dtype":
        tensors["model.norm.weight"] = norm.float()
    elif change == "a value":
        tensors["model.norm.weight"] = norm.index_fill(0, torch.tensor(3), 7.0)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AssertionError, match=r"names|dtypes|norm\.weight was not trained"):
        pairs.check_files(base, path)
        pairs.check_values(base, live, path, {})
