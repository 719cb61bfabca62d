"""What transformers can build merges, or is refused when the merge is planned."""

import pytest
import support as tables
from pairs import BASES, in_child
from shrink import MAPPINGS

pytestmark = pytest.mark.matrix

SAMPLE = {  # of all kinds: tied, fused, converted, of experts, state spaces, encoders and images
    "causal": """llama qwen3 gemma2 gpt2 gpt_neox bloom phi3 deepseek_v3 mixtral gpt_oss
        granitemoehybrid mamba2 zamba2 jamba qwen3_next bart xlnet""",
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
    told = in_child(task, name, kind, tmp_path)
    assert not told.startswith("wrong"), told
    support.found(told)
