"""Random requests: lengths from a distribution, arrivals from a process, all from named random streams."""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specs.errors import InputError
from traces import _config
from traces.workload import MAX_TOKENS

Int32s = NDArray[np.int32]


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A random generator for one purpose ("lengths", "arrivals" …) of the run with this seed.

    Streams of different purposes are independent, so that drawing more from one changes no other.

    Raises:
        InputError: `seed` is negative or not a whole number.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed: must be a whole number of at least 0, not {reprlib.repr(seed)}")
    # Not hash(): that differs from one process to the next.
    digest = hashlib.sha256(purpose.encode()).digest()
    return np.random.default_rng(np.random.SeedSequence([seed, int.from_bytes(digest[:16], "little")]))


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Arrivals by feedback: so many users, each sending its next request when the last one is answered."""

    concurrency: int
    think_time_s: float = 0.0  # between an answer and the user's next request


@dataclass(frozen=True, slots=True)
class LengthSample:
    """Sampled requests: lengths, and classes if the distribution names any."""

    prompt_tokens: Int32s
    output_tokens: Int32s
    slo_class: NDArray[np.uint8] | None
    slo_names: tuple[str, ...]


def sample_lengths(
    spec: Mapping[str, Any], n: int, rng: np.random.Generator, *, where: str = "lengths"
) -> tuple[Int32s, Int32s]:
    """Draw the prompt and output tokens of `n` requests; see `sample_requests`."""
    sample = sample_requests(spec, n, rng, where=where)
    return sample.prompt_tokens, sample.output_tokens


def sample_requests(
    spec: Mapping[str, Any], n: int, rng: np.random.Generator, *, where: str = "lengths"
) -> LengthSample:
    """Draw the lengths of `n` requests from the distribution that `spec` describes.

    `spec` has the key ``distribution`` and, except for ``mixture`` and ``empirical``, the keys
    ``prompt_tokens`` and ``output_tokens``, drawn independently. In each of these a whole number stands
    for itself, whatever the distribution:

    - ``fixed``: a whole number;
    - ``uniform``: ``[lo, hi]``, every whole number from lo to hi alike;
    - ``lognormal``: ``{median, sigma, min, max}``, sigma that of the logarithm; rounded; values outside
      min … max (default 1 … 2³¹ − 1) are drawn again;
    - ``zipf``: ``{exponent, min, max}``, P(k) proportional to k^−exponent for k from min to max;
    - ``empirical``: ``prompt_tokens`` and ``output_tokens`` are lists, drawn as pairs with replacement,
      with probabilities proportional to ``weights`` if given;
    - ``mixture``: ``components``, a list of the above, each with a ``weight`` and perhaps an ``slo_class``.

    The first requests are the same whatever `n` is: whatever is drawn has a stream of its own.

    Raises:
        InputError: a key is unknown or missing or a value impossible; `where` begins its dotted path.
    """
    kind = _config.choice(spec, "distribution", (*_SIDES, "empirical", "mixture"), where)
    if kind == "mixture":
        return _mixture(spec, n, rng, where)
    if kind == "empirical":
        prompt, output = _empirical(spec, n, rng, where)
    else:
        _config.refuse_unknown(spec, ("distribution", "prompt_tokens", "output_tokens"), where)
        prompt, output = (
            _side(kind, _config.get(spec, key, where), n, own, f"{where}.{key}")
            for key, own in zip(("prompt_tokens", "output_tokens"), rng.spawn(2), strict=True)
        )
    return LengthSample(prompt, output, None, ("default",))


def _side(kind: str, value: Any, n: int, rng: np.random.Generator, where: str) -> Int32s:
    """Draw one side, prompts or outputs, of distribution `kind`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return np.full(n, _config.whole(value, where), dtype=np.int32)
    return _SIDES[kind](value, n, rng, where)


def _fixed(value: Any, n: int, rng: np.random.Generator, where: str) -> Int32s:
    return np.full(n, _config.whole(value, where), dtype=np.int32)


def _uniform(value: Any, n: int, rng: np.random.Generator, where: str) -> Int32s:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise InputError(f"{where}: must be [lo, hi], not {reprlib.repr(value)}")
    low, high = (_config.whole(bound, where) for bound in value)
    _config.ordered(low, high, where)
    return rng.integers(low, high, n, dtype=np.int32, endpoint=True)


def _lognormal(value: Any, n: int, rng: np.random.Generator, where: str) -> Int32s:
    parameters = _config.mapping(value, ("median", "sigma"), ("min", "max"), where)
    median = _config.number(parameters["median"], f"{where}.median", above=0.0)
    sigma = _config.number(parameters["sigma"], f"{where}.sigma")
    low = _config.whole(parameters.get("min", 1), f"{where}.min")
    high = _config.whole(parameters.get("max", MAX_TOKENS), f"{where}.max")
    _config.ordered(low, high, where)
    # What rounds to low … high, in standard deviations of the logarithm.
    mean = math.log(median)
    if sigma == 0.0:
        inside = 1.0 if low - 0.5 <= median < high + 0.5 else 0.0
    else:
        inside = _normal_cdf((math.log(high + 0.5) - mean) / sigma)
        inside -= _normal_cdf((math.log(low - 0.5) - mean) / sigma)
    if inside < 1e-3:
        raise InputError(
            f"{where}: hardly any value of this lognormal lies within {low} to {high}; "
            "move median, or widen min and max"
        )
    return _draw_until(n, rng, lambda own, count: np.rint(np.exp(own.normal(mean, sigma, count))), low, high)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def _draw_until(
    n: int,
    rng: np.random.Generator,
    draw: Callable[[np.random.Generator, int], NDArray[np.float64]],
    low: int,
    high: int,
) -> Int32s:
    """Draw `n` values, drawing those outside low … high again, each round from a stream of its own."""
    values = draw(rng, n)
    while len(outside := np.flatnonzero((values < low) | (values > high))):
        rng = rng.spawn(1)[0]
        values[outside] = draw(rng, len(outside))
    return values.astype(np.int32)


def _zipf(value: Any, n: int, rng: np.random.Generator, where: str) -> Int32s:
    """Rejection-inversion, exact and without a table.

    W. Hörmann and G. Derflinger, "Rejection-inversion to generate variates from monotone discrete
    distributions", ACM TOMACS 6 (1996): invert the integral of the density h, round, and accept the right
    end, of length h(k), of the stretch that belongs to k. The stretch of the smallest value is cut to that
    length beforehand, so that it is always accepted.
    """
    parameters = _config.mapping(value, ("exponent", "min", "max"), (), where)
    exponent = _config.number(parameters["exponent"], f"{where}.exponent")
    if exponent > 100.0:
        raise InputError(f"{where}.exponent: must be at most 100, not {exponent:g}")
    low = _config.whole(parameters["min"], f"{where}.min")
    high = _config.whole(parameters["max"], f"{where}.max")
    _config.ordered(low, high, where)

    # In units of the smallest value, so that nothing underflows: h(x) = (x / low)^-exponent, h(low) = 1.
    power = 1.0 - exponent

    def integral(x: NDArray[np.float64]) -> NDArray[np.float64]:
        logarithm = np.log(x / low)
        return low * (logarithm if power == 0.0 else np.expm1(power * logarithm) / power)

    def inverse(area: NDArray[np.float64]) -> NDArray[np.float64]:
        ratio = area / low
        return low * np.exp(ratio if power == 0.0 else np.log1p(power * ratio) / power)

    start, end = integral(np.array([low + 0.5, high + 0.5])) - np.array([1.0, 0.0])

    def draw(own: np.random.Generator, count: int) -> NDArray[np.float64]:
        area = own.uniform(start, end, count)
        values = np.clip(np.rint(inverse(area)), low, high)
        accepted = area >= integral(values + 0.5) - (values / low) ** -exponent
        return np.where(accepted, values, 0.0)  # 0 is outside, so it is drawn again

    return _draw_until(n, rng, draw, low, high)


_SIDES: dict[str, Callable[[Any, int, np.random.Generator, str], Int32s]] = {
    "fixed": _fixed,
    "uniform": _uniform,
    "lognormal": _lognormal,
    "zipf": _zipf,
}


def _empirical(
    spec: Mapping[str, Any], n: int, rng: np.random.Generator, where: str
) -> tuple[Int32s, Int32s]:
    _config.refuse_unknown(spec, ("distribution", "prompt_tokens", "output_tokens", "weights"), where)
    prompt, output = (
        _config.token_list(_config.get(spec, key, where), f"{where}.{key}")
        for key in ("prompt_tokens", "output_tokens")
    )
    if len(prompt) != len(output):
        raise InputError(
            f"{where}: prompt_tokens and output_tokens are drawn as pairs, but have {len(prompt)} and "
            f"{len(output)} values"
        )
    probability = None
    if "weights" in spec:
        probability = _config.weights(spec["weights"], len(prompt), f"{where}.weights")
    index = rng.choice(len(prompt), n, p=probability)
    return prompt[index], output[index]


def _mixture(spec: Mapping[str, Any], n: int, rng: np.random.Generator, where: str) -> LengthSample:
    _config.refuse_unknown(spec, ("distribution", "components"), where)
    components = _config.get(spec, "components", where)
    if not isinstance(components, Sequence) or isinstance(components, str) or not components:
        raise InputError(f"{where}.components: must be a list of at least one distribution")
    places = [f"{where}.components[{index}]" for index in range(len(components))]
    parts = [
        _config.mapping(each, ("weight",), None, place)
        for each, place in zip(components, places, strict=True)
    ]
    probability = _config.weights(
        [part.pop("weight") for part in parts], len(parts), f"{where}.components.weight"
    )
    labels = [
        _config.text(part.pop("slo_class", "default"), f"{place}.slo_class")
        for part, place in zip(parts, places, strict=True)
    ]
    names = tuple(dict.fromkeys(labels))
    if len(names) > 256:
        raise InputError(
            f"{where}.components: name {len(names)} different slo_class, at most 256 are possible"
        )

    component = rng.choice(len(parts), n, p=probability)
    prompt, output = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.int32)
    own = rng.spawn(len(parts))
    for index, (part, place) in enumerate(zip(parts, places, strict=True)):
        if part.get("distribution") == "mixture":
            raise InputError(f"{place}.distribution: a mixture can't hold another mixture")
        members = np.flatnonzero(component == index)
        prompt[members], output[members] = sample_lengths(part, len(members), own[index], where=place)
    codes = np.array([names.index(label) for label in labels], dtype=np.uint8)[component]
    return LengthSample(prompt, output, codes if names != ("default",) else None, names)


MAX_REQUESTS = 100_000_000
"""Largest number of requests that is drawn: their columns take 1.6 GB."""


def arrival_times(
    process: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    n: int | None = None,
    duration_s: float | None = None,
    where: str = "arrivals",
) -> NDArray[np.float64]:
    """Draw the times (s, not decreasing) of the first `n` arrivals, or of those before `duration_s`, or both.

    `process` has the keys ``process`` and ``rate_rps`` (requests per second):

    - ``poisson``: exponential gaps, without a cap;
    - ``gamma``: gaps from a gamma distribution with the coefficient of variation ``cv``; 1 is Poisson,
      more is burstier;
    - ``uniform``: equal gaps, the first arrival at 0.

    Raises:
        InputError: a key is unknown or missing or a value impossible, neither bound is given, or more
            than `MAX_REQUESTS` would be drawn; `where` begins the dotted path of the key.
    """
    kind = _config.choice(process, "process", ("poisson", "gamma", "uniform"), where)
    _config.refuse_unknown(process, ("process", "rate_rps", *(["cv"] if kind == "gamma" else [])), where)
    rate_rps = _config.number(_config.get(process, "rate_rps", where), f"{where}.rate_rps", above=0.0)
    expected = _expected_arrivals(rate_rps, n, duration_s, where)
    if kind == "uniform":
        count = math.ceil(expected)
        times = np.arange(count) / rate_rps
        return times if duration_s is None else times[times < duration_s]
    cv = (
        _config.number(_config.get(process, "cv", where), f"{where}.cv", above=0.0)
        if kind == "gamma"
        else 1.0
    )
    if cv > 1e3:
        raise InputError(f"{where}.cv: must be at most 1000, not {cv:g}")

    def gaps(count: int) -> NDArray[np.float64]:
        if cv == 1.0:
            return rng.exponential(1.0 / rate_rps, count)
        return rng.gamma(1.0 / cv**2, cv**2 / rate_rps, count)

    if duration_s is None:
        return np.cumsum(gaps(math.ceil(expected)))
    return _until(duration_s, MAX_REQUESTS if n is None else n, expected, gaps)


def _expected_arrivals(rate_rps: float, n: int | None, duration_s: float | None, where: str) -> float:
    """Arrivals that the bounds let through on average."""
    if n is None and duration_s is None:
        raise InputError(f"{where}: need num_requests or duration_s to know when to stop")
    bounds = []
    if n is not None:
        bounds.append(float(n))
    if duration_s is not None:
        bounds.append(duration_s * rate_rps)
    if min(bounds) > MAX_REQUESTS:
        raise InputError(f"{where}: ask for {min(bounds):.3g} requests, more than {MAX_REQUESTS}")
    return min(bounds)


def _until(
    duration_s: float, limit: int, expected: float, gaps: Callable[[int], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Add up gaps until `duration_s`, at most `limit` of them, drawing about `expected` at a time."""
    blocks: list[NDArray[np.float64]] = []
    now_s, count = 0.0, 0
    size = math.ceil(expected + 4.0 * math.sqrt(expected) + 16.0)
    while now_s < duration_s and count < limit:
        block = now_s + np.cumsum(gaps(size))
        now_s = float(block[-1])
        count += size
        blocks.append(block)
    times = np.concatenate(blocks) if blocks else np.zeros(0)
    return times[: min(limit, int(np.searchsorted(times, duration_s, side="left")))]
