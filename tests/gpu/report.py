"""Pure functions of tests/gpu/run: what fits in a card's memory, and the table of results."""

# Dense bf16 products with f32 sums, TFLOP/s, as the vendor states them; the first name that the card's contains.
PEAK_TFLOPS = [("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.4), ("H200", 989.4), ("GH200", 989.4), ("B200", 2250.0),
               ("B100", 1800.0), ("A100", 312.0), ("A800", 312.0), ("H800", 989.4)]
# What a run is to reach (fractions), by kind.
TARGETS = {"memory": 0.80, "grouped": 0.80, "mfu": {"fine": 0.45, "coarse": 0.55}, "over PyTorch": 1.3}

MODELS = {
    "fine": dict(vocab=50304, width=2048, layers=16, heads=16, kv_heads=16, dim=128, experts=64, top_k=8, inner=1024, seq=4096,
                 batch=32),
    "coarse": dict(vocab=50304, width=4096, layers=8, heads=32, kv_heads=8, dim=128, experts=8, top_k=2, inner=14336, seq=4096,
                   batch=32),
}


def peak_tflops(card):
    return next((peak for name, peak in PEAK_TFLOPS if name in card), None)


def attention_parameters(m):
    return m["width"] * m["dim"] * (2 * m["heads"] + 2 * m["kv_heads"])


def parameters(m):
    layer = attention_parameters(m) + m["experts"] * (3 * m["inner"] + 1) * m["width"] + 2 * m["width"]
    return m["layers"] * layer + (2 * m["vocab"] + 1) * m["width"]


def flops_per_token(m):
    """Forward and backward; causal attention counts half of its square. The count of models/model_config.h."""
    layer = attention_parameters(m) + (m["top_k"] * 3 * m["inner"] + m["experts"]) * m["width"]
    return 6 * (m["layers"] * layer + m["vocab"] * m["width"]) + 6 * m["layers"] * m["heads"] * m["dim"] * m["seq"]


def needed_bytes(m, micro_rows, recompute):
    """About: bf16 weights, f32 gradients, master weights and two moments, and what the backward pass keeps."""
    width, tokens = m["width"], micro_rows * m["seq"]
    qkv = m["dim"] * (m["heads"] + 2 * m["kv_heads"])
    layer = 2 * 4 * width + 2 * (2 * width + qkv + m["heads"] * m["dim"]) + m["top_k"] * 2 * (2 * width + 3 * m["inner"])
    kept = m["layers"] * 4 * width + 2 * layer if recompute else m["layers"] * layer
    logits = 8192 * m["vocab"] * 6
    return 18 * parameters(m) + tokens * kept + logits + (2 << 30)


# Rows of a micro-batch, recomputation: the fastest first.
ATTEMPTS = [(4, False), (2, False), (1, False), (4, True), (1, True)]


def plan(m, memory_bytes):
    """(layers, attempts that are worth a try), with as many layers as there is memory for without recomputation."""
    for layers in range(m["layers"], 0, -1):
        needed = {attempt: needed_bytes({**m, "layers": layers}, *attempt) for attempt in ATTEMPTS}
        if any(bytes <= 0.96 * memory_bytes for (_, recompute), bytes in needed.items() if not recompute):
            return layers, [attempt for attempt in ATTEMPTS if needed[attempt] <= memory_bytes]
    return 0, []


def _percent(value):
    return "" if value is None else f"{100 * value:.0f} %"


def _verdict(value, target):
    return "" if value is None else ("yes" if value >= target else "no")


def _kernel_rows(lines):
    for line in lines:
        if "case" not in line:
            continue
        name = f"{line['model']}: {line['case']}"
        if "error" in line:
            yield f"| {name} | failed: {line['error'][:120].replace('|', '/')} | | | | |"
            continue
        rate = f"{line['tflops']:.0f} TFLOP/s" if "tflops" in line else f"{line['gb_s']:.0f} GB/s"
        target = TARGETS["memory"] if line.get("of") == "copy" else TARGETS["grouped"]
        share = line.get("fraction")
        of = f"{_percent(share)} of {line['of']}" if share is not None else ""
        yield (f"| {name} | {line['ms']:.3f} | {line['ms_p10']:.3f} to {line['ms_p90']:.3f} | {rate} | {of} | "
               f"{_verdict(share, target)} |")


def _collective_rows(lines):
    rows = {}
    for line in lines:
        if "op" not in line:
            yield f"| failed: {line.get('error', '')[:120].replace('|', '/')} | | | | | |"
            continue
        rows.setdefault((line["ranks"], line["devices"], line["op"], line["dtype"], line["bytes"]), {})[line["way"]] = line
    for (ranks, devices, op, dtype, size), ways in rows.items():
        cells = []
        for way in ("peers", "staged"):
            line = ways.get(way, {"error": "not measured"})
            cells.append(f"failed: {line['error'][:120].replace('|', '/')} | " if "error" in line else
                         f"{line['ms']:.3f} ({line['ms_p10']:.3f} to {line['ms_p90']:.3f}) | {line['gb_s']:.3g}")
        both = [ways.get(way, {}).get("ms") for way in ("peers", "staged")]
        ratio = f"{both[1] / both[0]:.1f}x" if all(both) else ""
        yield f"| {op}, {dtype}, {size / 2**20:g} MiB, {ranks} ranks on {min(ranks, devices)} GPUs | {cells[0]} | {cells[1]} | {ratio} |"


def _train_rows(train):
    for model, both in train.items():
        for program in ("shoal", "pytorch"):
            r = both.get(program)
            if r is None:
                continue
            if "error" in r:
                yield f"| {model} | {program} | failed: {r['error'][:160].replace('|', '/')} | | | | |"
                continue
            layout = f"{both['layers']} of {MODELS[model]['layers']} layers, {r['micro_rows']} x {MODELS[model]['seq']} at once" + (
                ", recomputed" if r["recompute"] else "")
            memory = f"{r['peak_memory_mib'] / 1024:.1f}" if r.get("peak_memory_mib") else ""
            verdict = _verdict(r.get("mfu"), TARGETS["mfu"][model]) if program == "shoal" else ""
            yield f"| {model} | {program} | {layout} | {r['tokens_per_s']:,.0f} | {_percent(r.get('mfu'))} | {memory} | {verdict} |"
        if both.get("ratio"):
            yield f"| {model} | ratio | | {both['ratio']:.2f}x | | | {_verdict(both['ratio'], TARGETS['over PyTorch'])} |"


def markdown(results):
    """The results as text for docs/performance.md."""
    card = results.get("card", {})
    out = [f"## On a GPU: {card.get('name', 'none')}", "",
           f"`tests/gpu/run`, version {results.get('version')}, driver {card.get('driver', 'none')}, {results.get('started')}.", "",
           "| part | step | outcome | seconds |", "|---|---|---|---|"]
    for s in results["steps"]:
        note = f": {s['note']}" if s.get("note") else ""
        out.append(f"| {s['part']} | {s['name']} | {s['status']}{note.replace('|', '/')} | {s['seconds']:.1f} |")
    if results.get("kernels"):
        out += ["", "Medians of at least 20 runs. Bytes are each operand read and each result written once; the dense product has the "
                "size of all rows together.", "",
                "| kernel | ms | p10 to p90 | rate | share | reached |", "|---|---|---|---|---|---|", *_kernel_rows(results["kernels"])]
    if results.get("collectives"):
        out += ["", "Collectives of processes, in place, as rank 0 sees them: medians (p10 to p90); GB/s are bytes that a rank must at least "
                "take in.", "",
                "| collective | peers, ms | GB/s | staged, ms | GB/s | staged / peers |", "|---|---|---|---|---|---|",
                *_collective_rows(results["collectives"])]
    if results.get("train"):
        out += ["", f"MFU against {card.get('peak_tflops')} TFLOP/s. Memory is the card's, by nvidia-smi.", "",
                "| model | program | layout | tokens/s | MFU | GiB | reached |", "|---|---|---|---|---|---|---|",
                *_train_rows(results["train"])]
    return "\n".join(out) + "\n"
