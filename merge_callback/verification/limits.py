"""Which figures are too bad to be published, and the cure. Knows nothing of models.

16 bits change the outputs by little more than the noise of their arithmetic. What is beyond that is
another model than the one that was trained, whether it is nearer to the base or further from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_callback.options import MergeOptions
from merge_callback.retention import Retention
from merge_callback.verification.outputs import Comparison

_SHOWN = 5
_NOISE_KL = 0.02  # nats a row; two implementations of one 16-bit model differ by up to 0.005
_NOISE_ERROR = 0.1  # of logits, relative
_SCORES = 4.0  # times the noise: bfloat16 kernels of one untrained model differ by 0.23
_ROUTED = 4.0  # times the noise: a token that goes to another expert is far off
_SHARE = 0.05  # of how far the base is away
_GAIN = 0.25  # that 16 bits may be off, and as many standard errors:
_ERRORS = 3.0
_LITTLE = 0.5  # gain kept, below which most of it is lost
_LOST_KL = 1.0  # nats a row beyond twice the base's; no rounding to 4 bits does that


def misses(
    method: str,
    found: Comparison,
    options: MergeOptions,
    kept: Mapping[str, Retention],
    *,
    routed: bool = False,
) -> Iterator[str]:
    """Figures that are worse than they may be, or than was asked for.

    Args:
        routed: the model has experts, and a router that noise can turn.
    """
    if not found.finite:
        yield f"{method}: its outputs, or the live model's, are not finite"
        return
    # On the original base it is another model by itself, which may have gained less.
    if method == "merged_16bit" and options.base == "live":
        yield from _noise_misses(method, found, options, noise_of(routed))
    far = None not in (found.kl, found.kl_base)
    if far and found.kl > 2 * found.kl_base + _LOST_KL:  # type: ignore[operator]
        yield (
            f"{method}: KL {found.kl:.3g} nats, and {found.kl_base:.3g} for the base without the "
            "adapter: the merged model does not reproduce the trained one; report it"
        )
    yield from _limit_misses(method, found, options, kept)


def _noise_misses(
    method: str, found: Comparison, options: MergeOptions, noise: float
) -> Iterator[str]:
    """Bounds that hold from both sides, and where no gain can be told."""
    cure = "use dtype='float32', and if that is no nearer, report it"
    gain = found.gain_kept
    if gain is not None and options.min_gain_kept is None and _is_told(found, noise):
        slack = noise * _GAIN + _ERRORS * (found.gain_error or 0.0)
        if abs(gain - 1) > slack:
            yield f"{method}: keeps {gain:.1%} of what training gained; {cure}"
    for told in beyond_noise(found, noise, kl=options.max_kl is None):
        yield f"{method}: {told}; {cure}"


def beyond_noise(found: Comparison, noise: float = 1.0, *, kl: bool = True) -> Iterator[str]:
    """What two models differ in by more than 16 bits explain, and a share of how far the base is.

    Args:
        noise: times that of a model without experts.
        kl: look at it, too.
    """
    if found.kl is not None and kl:
        most = noise * _NOISE_KL + _SHARE * (found.kl_base or 0.0)
        if not found.kl <= most:
            yield f"KL {found.kl:.3g} nats, and 16-bit rounding explains {most:.2g}"
    scores = _SCORES if found.kl is not None else 1.0  # KL is the sharper measure of scores
    most = scores * noise * _NOISE_ERROR + _SHARE * (found.error_base or 0.0)
    if not found.error <= most:
        yield f"outputs are off by {found.error:.2g}, and 16-bit rounding explains {most:.2g}"


def noise_of(routed: bool) -> float:
    """The noise of a model; `routed`: it has experts, and a router that noise can turn."""
    return _ROUTED if routed else 1.0


def keeps_little(found: Mapping[str, Any]) -> bool:
    """Whether figures, as a manifest has them, show that most of what training gained is lost.

    What training gained must stand out from noise.
    """
    gain, error = found.get("gain_kept"), found.get("gain_error") or 0.0
    if gain is None or gain + _ERRORS * error >= _LITTLE:
        return False
    gained: float = found["loss_base"] - found["loss_live"]
    return gained > _least_loss(found.get("kl") is not None, found["loss_base"])


def _is_told(found: Comparison, noise: float) -> bool:
    """Whether the loss is further from the live model's than the noise of 16 bits explains."""
    if found.loss is None or found.loss_live is None:
        return False
    least = _least_loss(found.kl is not None, found.loss_base or 0.0)
    return abs(found.loss - found.loss_live) > noise * least


def _least_loss(of_classes: bool, loss_base: float) -> float:
    """What a loss may move by noise: nats a row, or a share of a squared error."""
    return _NOISE_KL if of_classes else _NOISE_ERROR * loss_base


def _limit_misses(
    method: str, found: Comparison, options: MergeOptions, kept: Mapping[str, Retention]
) -> Iterator[str]:
    told = []
    least, most = options.min_gain_kept, options.max_kl
    if least is not None and found.gain_kept is None:
        yield (
            f"{method}: min_gain_kept cannot be met: on {found.rows} predictions training gained "
            "less than its own standard error, or there was one sequence alone; give more "
            "verification_data, or limit max_kl instead"
        )
    elif least is not None and found.gain_kept is not None and found.gain_kept < least:
        told.append(f"keeps {found.gain_kept:.1%} of the gain, min_gain_kept is {least:.1%}")
    if most is not None and found.kl is None:
        yield f"{method}: max_kl cannot be met: its outputs are no scores of classes"
    elif most is not None and found.kl is not None and not found.kl <= most:
        told.append(f"KL {found.kl:.4f} nats, max_kl is {most:g}")
    if not told:
        return
    values = {key: part.value for key, part in kept.items()}
    by_value = sorted((value, key) for key, value in values.items() if value is not None)
    names = ", ".join(f"{key} ({value:.2f})" for value, key in by_value[:_SHOWN])
    cure = "use rounding='tuned', more calibration_tokens, or save_method='merged_16bit'"
    if method == "merged_16bit":
        cure = "use dtype='float32'"
    yield f"{method}: {'; '.join(told)}; least retention: {names}; {cure}"
