"""What a GPU user is told when no kernel can run, and that the answer is right."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jax_flash_attn
from jax_flash_attn import _support
from tests.support import calls, cases, inputs, jax_child, oracle

pytestmark = pytest.mark.gpu

WITHOUT_NVRTC = """
from tests.support import calls, cases, oracle

case = cases.BY_NAME["causal_gqa"]
right = oracle.expected(case)
for _ in range(2):
    oracle.check(calls.run(case), right)
try:
    calls.run(case, implementation="cuda")
except NotImplementedError as error:
    answer["error"] = str(error)
"""


def test_missing_nvrtc(tmp_path):
    missing = str(tmp_path / "libnvrtc.so")
    answer = jax_child.run(WITHOUT_NVRTC, JAX_FLASH_ATTN_NVRTC_PATH=missing)
    about_us = [text for text in answer["warnings"] if "jax_flash_attn" in text]
    assert len(about_us) == 1
    for text in (about_us[0], answer["error"]):
        assert "JAX_FLASH_ATTN_NVRTC_PATH" in text
        assert "pip install" in text
        assert missing in text


@pytest.fixture
def nothing_warned(monkeypatch):
    monkeypatch.setattr(_support, "_warned", set())


@pytest.mark.usefixtures("nothing_warned")
@pytest.mark.parametrize(
    "case",
    [
        dataclasses.replace(cases.BY_NAME["causal_gqa"], dtype="float32"),
        dataclasses.replace(cases.BY_NAME["causal_gqa"], head_dim=264),
    ],
    ids=["float32", "head_dim"],
)
def test_call_that_no_kernel_takes(case, recwarn):
    reason = "float32" if case.dtype == "float32" else "264"
    with pytest.warns(UserWarning, match=f"plain JAX path on a GPU.*{reason}"):
        results = calls.run(case)
    oracle.check(results, oracle.expected(case))
    recwarn.clear()
    calls.run(dataclasses.replace(case, seqlen_q=case.seqlen_q + 1))
    assert [w for w in recwarn if "jax_flash_attn" in str(w.message)] == []


@pytest.mark.usefixtures("nothing_warned")
def test_asked_for_jax_path_is_silent(recwarn):
    case = cases.BY_NAME["causal_gqa"]
    oracle.check(calls.run(case, implementation="jax"), oracle.expected(case))
    assert [w for w in recwarn if "jax_flash_attn" in str(w.message)] == []


@pytest.mark.usefixtures("nothing_warned")
def test_dense_mask_is_said():
    q = jnp.ones((2, 8, 2, 16), jnp.bfloat16)
    with pytest.warns(UserWarning, match="a mask array is passed"):
        jax_flash_attn.dot_product_attention(q, q, q, mask=jnp.ones((8, 8), bool))


def test_cpu_program_in_a_process_with_a_gpu():
    cpu = jax.devices("cpu")[0]
    case = cases.BY_NAME["causal_gqa"]
    arrays = jax.device_put(inputs.make(case), cpu)
    results = jax.jit(calls.with_gradients(calls.attention(case)))(arrays)
    assert results["out"].devices() == {cpu}
    oracle.check(results, oracle.expected(case))


def test_auto_runs_the_kernel_and_explain_says_so():
    q = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    found = jax_flash_attn.explain(q, q, q)
    assert found.implementation == "cuda"
    lowered = jax.jit(jax_flash_attn.flash_attn_func).lower(q, q, q)
    assert "flash_attention_forward" in lowered.as_text()
