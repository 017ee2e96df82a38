#!/usr/bin/env python3
"""Training of the two models of configs/bench-gpu-*.yaml in PyTorch, for comparison with `shoal bench train`: one GPU, bf16 weights and
activations, fp32 residual stream, router, norms and master weights, clipping, AdamW. What PyTorch offers for speed is used: torch.compile
on whole layers, its attention (cuDNN's or flash), grouped products for experts, fused AdamW; permutations have gathers as gradients, and
the loss never has the logits of more than a chunk. It is let off one thing: gradients of micro-batches are summed in bf16, where
Shoal has fp32. Prints one line of JSON."""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import report  # noqa: E402

GROUPED = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
EPSILON, THETA, AUX, CHUNK = 1e-5, 1e6, 0.02, 8192
USE_GROUPED = False  # After check_grouped.


def check_grouped():
    """Whether the grouped product is there and right, backwards too, for groups of any size."""
    if GROUPED is None:
        return False
    try:
        torch.manual_seed(1)
        counts = [5, 0, 131, 24]
        offsets = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
        x = torch.randn(sum(counts), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(sum(counts), 128, device="cuda", dtype=torch.bfloat16)
        results = []
        for product in (lambda: GROUPED(x, w.transpose(-2, -1), offs=offsets), lambda: loop_product(x, w, offsets)):
            y = product()
            results.append((y.detach(), *torch.autograd.grad(y, (x, w), dy)))
        torch.cuda.synchronize()
        return all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.25) for a, b in zip(*results))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        print(f"no grouped products: {error}", file=sys.stderr)
        return False


@torch.compiler.disable
def loop_product(x, weight, offsets):
    """One product for each expert, with the counts on the host."""
    parts, begin = [], 0
    for expert, end in enumerate(offsets.tolist()):
        parts.append(x[begin:end] @ weight[expert].t())
        begin = end
    return torch.cat(parts)


def product_of_experts(x, weight, offsets):
    if USE_GROUPED:
        return GROUPED(x, weight.transpose(-2, -1), offs=offsets)
    return loop_product(x, weight, offsets)


class ToExperts(torch.autograd.Function):
    """Rows of tokens in the order of experts; a token has top_k of them."""

    @staticmethod
    def forward(ctx, x, order, place, top_k):
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx, dy):
        (place,) = ctx.saved_tensors
        return dy[place].view(-1, ctx.top_k, dy.shape[-1]).sum(1), None, None, None


class FromExperts(torch.autograd.Function):
    """And back: the row of each choice, by token."""

    @staticmethod
    def forward(ctx, y, order, place):
        ctx.save_for_backward(order)
        return y[place]

    @staticmethod
    def backward(ctx, dy):
        (order,) = ctx.saved_tensors
        return dy[order], None, None


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight.float(), EPSILON).to(torch.bfloat16)


def layer(x, weights, cos, sin, heads, kv_heads, dim, top_k):
    """x: [rows, seq, width], f32. Returns it after the layer, and how often and how probably each expert was chosen."""
    norm1, w_qkv, w_out, norm2, w_router, w_gate_up, w_down = weights
    rows, seq, width = x.shape
    qkv = F.linear(norm(x, norm1), w_qkv).view(rows, seq, heads + 2 * kv_heads, dim).transpose(1, 2)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=heads != kv_heads)
    x = x + F.linear(attended.transpose(1, 2).reshape(rows, seq, heads * dim), w_out)

    normed = norm(x, norm2).view(-1, width)
    probs = F.linear(normed, w_router).float().softmax(-1)
    weight, chosen = probs.topk(top_k, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    chosen = chosen.flatten()
    order = chosen.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = (chosen[:, None] == torch.arange(probs.shape[-1], device=x.device)).sum(0)
    offsets = counts.cumsum(0).to(torch.int32)
    gate, up = product_of_experts(ToExperts.apply(normed, order, place, top_k), w_gate_up, offsets).chunk(2, -1)
    y = FromExperts.apply(product_of_experts(F.silu(gate) * up, w_down, offsets), order, place)
    y = (y.view(-1, top_k, width).float() * weight[..., None]).sum(1)
    return x + y.view_as(x), counts.float(), probs.sum(0)


def chunk_loss(hidden, head, targets, scale):
    """The sum of the losses, and the gradients by both factors, of a sum times `scale`."""
    logits = F.linear(hidden, head).float()
    logz = logits.logsumexp(-1, keepdim=True)
    loss = (logz - logits.gather(1, targets[:, None])).sum()
    hot = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    dlogits = (((logits - logz).exp() - hot.float()) * scale).to(hidden.dtype)
    return loss, dlogits @ head, dlogits.t() @ hidden


class Loss(torch.autograd.Function):
    """Mean cross-entropy; gradients are computed with it, chunk by chunk, so that no product is done twice."""
    chunk = staticmethod(chunk_loss)

    @staticmethod
    def forward(ctx, hidden, head, targets):
        tokens = hidden.shape[0]
        total, dhidden, dhead = 0.0, torch.empty_like(hidden), None
        for begin in range(0, tokens, CHUNK):
            part = slice(begin, min(begin + CHUNK, tokens))
            loss, dhidden[part], dw = Loss.chunk(hidden[part], head, targets[part], 1.0 / tokens)
            total, dhead = total + loss, dw if dhead is None else dhead.add_(dw)
        ctx.save_for_backward(dhidden, dhead)
        return total / tokens

    @staticmethod
    def backward(ctx, scale):
        dhidden, dhead = ctx.saved_tensors
        return dhidden * scale, dhead * scale, None


class Model:
    def __init__(self, sizes, recompute):
        self.sizes, self.recompute = sizes, recompute
        m = sizes
        qkv = m["dim"] * (m["heads"] + 2 * m["kv_heads"])
        self.embedding, self.head = self.matrix(m["vocab"], m["width"]), self.matrix(m["vocab"], m["width"])
        self.norm = self.vector(m["width"])
        self.layers = [(self.vector(m["width"]), self.matrix(qkv, m["width"]), self.matrix(m["width"], m["heads"] * m["dim"]),
                        self.vector(m["width"]), self.matrix(m["experts"], m["width"]),
                        self.matrix(m["experts"], 2 * m["inner"], m["width"]), self.matrix(m["experts"], m["width"], m["inner"]))
                       for _ in range(m["layers"])]
        angles = torch.arange(m["seq"], device="cuda")[:, None] * THETA ** (-torch.arange(0, m["dim"], 2, device="cuda") / m["dim"])
        self.cos, self.sin = angles.cos(), angles.sin()
        self.layer = torch.compile(layer, dynamic=False)
        Loss.chunk = staticmethod(torch.compile(chunk_loss, dynamic=False))

    @staticmethod
    def matrix(*shape):
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02).requires_grad_()

    @staticmethod
    def vector(size):
        return torch.ones(size, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def groups(self):
        """What is updated together: a layer's parameters."""
        return [[self.embedding], [self.head, self.norm], *map(list, self.layers)]

    def loss(self, tokens):
        """(cross-entropy, with the balance loss) of tokens[rows, seq + 1]."""
        m = self.sizes
        x = F.embedding(tokens[:, :-1], self.embedding).float()
        counts, probs = 0.0, 0.0
        for weights in self.layers:
            arguments = (x, weights, self.cos, self.sin, m["heads"], m["kv_heads"], m["dim"], m["top_k"])
            x, count, prob = checkpoint(self.layer, *arguments, use_reentrant=False) if self.recompute else self.layer(*arguments)
            counts, probs = counts + count, probs + prob
        seen = m["layers"] * tokens[:, 1:].numel()
        balance = m["experts"] * (counts / seen * (probs / seen)).sum()
        hidden = norm(x, self.norm).view(-1, m["width"])
        cross_entropy = Loss.apply(hidden, self.head, tokens[:, 1:].flatten())
        return cross_entropy.detach(), cross_entropy + AUX * balance


class AdamW:
    """Fused AdamW on fp32 master weights, a layer at a time, so that only a layer has fp32 gradients at once."""

    def __init__(self, groups):
        self.groups = groups
        self.masters = [[p.detach().float() for p in group] for group in groups]
        self.optimizers = [
            torch.optim.AdamW([{"params": [p for p in masters if p.dim() > 1], "weight_decay": 0.1},
                               {"params": [p for p in masters if p.dim() == 1], "weight_decay": 0.0}],
                              lr=3e-4, betas=(0.9, 0.95), eps=1e-8, fused=True) for masters in self.masters]

    @torch.no_grad()
    def step(self, parts):
        """Gradients are sums over `parts` micro-batches; the norm of their mean is clipped at 1."""
        norms = torch._foreach_norm([p.grad for group in self.groups for p in group], dtype=torch.float32)
        total = torch.stack(norms).norm() / parts
        scale = (1.0 / (total + 1e-6)).clamp(max=1.0) / parts
        for group, masters, optimizer in zip(self.groups, self.masters, self.optimizers):
            for p, master in zip(group, masters):
                master.grad = p.grad.float().mul_(scale)
                p.grad = None
            optimizer.step()
            torch._foreach_copy_(group, masters)
            for master in masters:
                master.grad = None


def attention_backends():
    """cuDNN's attention first, where this PyTorch can say so."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
                           set_priority=True)
    except (ImportError, TypeError, AttributeError):
        return contextlib.nullcontext()


def measure(options, sizes):
    torch.manual_seed(0)
    model = Model(sizes, options.recompute)
    optimizer = AdamW(model.groups())
    parts = sizes["batch"] // options.micro_rows
    batch = torch.randint(sizes["vocab"], (sizes["batch"], sizes["seq"] + 1), device="cuda")
    seconds, losses = [], []
    with attention_backends():
        for _ in range(options.warmup + options.steps):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step_loss = torch.zeros((), device="cuda")
            for rows in batch.chunk(parts):
                cross_entropy, loss = model.loss(rows)
                loss.backward()
                step_loss += cross_entropy / parts
            optimizer.step(parts)
            losses.append(step_loss.item())
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    if not all(loss == loss and loss < losses[0] + 0.1 for loss in losses):
        raise SystemExit(f"the loss of one batch does not fall: {losses}")
    return seconds[options.warmup:], losses


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=report.MODELS, required=True)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--micro-rows", type=int, default=2, help="sequences at once; divides the batch")
    parser.add_argument("--recompute", action="store_true", help="keep only layers' inputs for the backward pass")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    global USE_GROUPED
    sizes = dict(report.MODELS[options.model])
    sizes["layers"] = options.layers or sizes["layers"]
    USE_GROUPED = check_grouped()
    seconds, losses = measure(options, sizes)
    median = statistics.median(seconds)
    tokens_per_s = sizes["batch"] * sizes["seq"] / median
    card = torch.cuda.get_device_name(0)
    peak = report.peak_tflops(card)
    print(json.dumps({
        "program": "pytorch", "torch": torch.__version__, "card": card, "model": options.model, "layers": sizes["layers"],
        "grouped_products": USE_GROUPED, "step_ms_median": 1e3 * median, "step_ms_best": 1e3 * min(seconds),
        "tokens_per_s": tokens_per_s, "mfu": tokens_per_s * report.flops_per_token(sizes) / (peak * 1e12) if peak else None,
        "allocated_peak_mib": torch.cuda.max_memory_allocated() / 2**20, "first_loss": losses[0], "last_loss": losses[-1]}))


if __name__ == "__main__":
    main()
