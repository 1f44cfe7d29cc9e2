"""The same parts in torch on the same card: dense products, grouped_mm and flash attention; see `accelerator`."""

from collections.abc import Callable
from typing import Any

from benchmarks.accelerator import Options
from benchmarks.layer_parts import EXPERTS, PER_TOKEN, sizes
from benchmarks.timing import report, uneven_sizes

TURNS, CALLS = 3, 20


def torch(options: Options) -> None:
    """Measures with the device's own events; needs torch with CUDA."""
    try:
        import torch
        from torch.nn import functional
    except ImportError:
        report("torch is not installed: no peers in this run")
        return
    if not torch.cuda.is_available():
        report("torch sees no CUDA device: no peers in this run")
        return
    batch, seq_len, d, f, heads, kv_heads = sizes(options.tiny)
    rows = batch * seq_len * PER_TOKEN
    flops = 2 * rows * d * f
    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731

    def time_it(what: str, call: Callable[[], Any], work: float) -> None:
        try:
            call()
            turns = []
            for _ in range(TURNS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(CALLS):
                    call()
                end.record()
                torch.cuda.synchronize()
                turns.append(begin.elapsed_time(end) / CALLS)
        except RuntimeError as error:
            report(what, failed=str(error).splitlines()[0][:160])
            return
        report(what, ms=sorted(turns)[1], TFLOP_a_s=work / sorted(turns)[1] / 1e9)

    x, y = new(rows, d), new(rows, f)
    w_up, w_down = new(EXPERTS, d, f), new(EXPERTS, f, d)
    time_it("torch dense rows x d_model x d_ff", lambda: x @ w_up[0], flops)
    time_it("torch dense rows x d_ff x d_model", lambda: y @ w_down[0], flops)
    time_it("torch dense d_model x rows x d_ff", lambda: x.T @ y, flops)
    ends = torch.tensor(uneven_sizes(rows, EXPERTS), device="cuda").cumsum(0).to(torch.int32)
    grouped: Any = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    time_it("torch grouped_mm, forward up", lambda: grouped(x, w_up, offs=ends), flops)
    time_it("torch grouped_mm, forward down", lambda: grouped(y, w_down, offs=ends), flops)
    time_it("torch grouped_mm, rows' gradients", lambda: grouped(x, w_down.transpose(1, 2), offs=ends), flops)
    time_it("torch grouped_mm, weights' gradients", lambda: grouped(x.T, y, offs=ends), flops)
    del x, y, w_up, w_down

    q, k, v, d_out = (new(batch, n, seq_len, d // heads) for n in (heads, kv_heads, kv_heads, heads))
    useful = 4 * batch * seq_len * (seq_len / 2) * d
    run = lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731

    def gradients() -> None:
        for array in (q, k, v):
            array.requires_grad_().grad = None
        run().backward(d_out)

    time_it("torch attention, forward", run, useful)
    time_it("torch attention, forward and gradients", gradients, 3 * useful)
