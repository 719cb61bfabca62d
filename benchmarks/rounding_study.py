"""A study, no part of the package: how much of a LoRA update can stock NF4 hold?

    python benchmarks/rounding_study.py BASE ADAPTER TOKENS [--seqs 256] [--steps 200]

BASE: a 16-bit SmolLM2-135M directory (the quickstart makes one); ADAPTER: a LoRA adapter of it with
alpha / r = 2 on all linear layers, trained on its NF4 double-quantised form; TOKENS: a safetensors
file with `calibration` (sequences, length) and `heldout`. It has a Llama forward of its own.

1. `calibrate`: block by block, from the merged model's own inputs x and the live model's x_l.
   Least squares gives a 16-bit target W*; GPTQ rounds it on the grid of the base; block scales are
   refitted in closed form and codes improved by coordinate descent, in turn. No gradients.
2. `tune`: Adam on block scales (double quantisation in the loop) and norms against
   KL(live || merged), codes fixed.
3. `pack`: the stock container, and a check that bitsandbytes dequantises it to what was scored.

docs/fidelity.md explains it and has the results.
"""

import argparse
import math
import resource
import time

import bitsandbytes.functional as F
import torch
import torch.nn.functional as T
from safetensors.torch import load_file

NF4 = F.get_4bit_type("nf4", "cpu")
MID = (NF4[1:] + NF4[:-1]) / 2
NAMES = dict(
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    g="mlp.gate_proj",
    u="mlp.up_proj",
    d="mlp.down_proj",
)
GROUPS = (("q", "k", "v"), ("o",), ("g", "u"), ("d",))  # linears that share an input
LAYERS, HEADS, KV, HD, EPS, THETA = 30, 9, 3, 64, 1e-5, 1e5
BF = torch.bfloat16


def rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------- the container
def nearest(z):
    return torch.bucketize(z, MID)  # index of the nearest NF4 value


def nested(s):
    """What double quantisation makes of the block scales (of any sign)."""
    off = s.mean()
    q, st = F.quantize_blockwise(s - off, blocksize=256)
    return F.dequantize_blockwise(q, st) + off


def dequant(idx, s, dtype=torch.float32):
    """idx: (out, in) codes, s: stored scales, one per 64."""
    return (NF4[idx.long()].view(-1, 64) * s[:, None]).view(idx.shape).to(dtype)


def pack(idx, s):
    """(packed codes, QuantState) as bitsandbytes keeps them, from the scales before nesting."""
    off = s.mean()
    q, st2 = F.quantize_blockwise(s - off, blocksize=256)
    i = idx.flatten().to(torch.uint8)
    data = ((i[::2] << 4) | i[1::2]).view(-1, 1)
    return data, F.QuantState(
        absmax=q,
        shape=idx.shape,
        code=NF4,
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
        offset=off,
        state2=st2,
    )


# ---------------------------------------------------------------- the models
class Live:
    """The model that was trained: 4-bit weights, adapter, norms, embedding; built by the weight."""

    def __init__(self, base_path, adapter_path):
        base = load_file(f"{base_path}/model.safetensors")
        ad = load_file(f"{adapter_path}/adapter_model.safetensors")
        self.emb = base["model.embed_tokens.weight"]
        self.q4, self.ab, self.absmax, self.norms = {}, {}, {}, {}
        for l in range(LAYERS):
            for k, n in NAMES.items():
                w = base[f"model.layers.{l}.{n}.weight"].float()
                p = f"base_model.model.model.layers.{l}.{n}."
                self.q4[l, k] = F.quantize_4bit(
                    w, blocksize=64, quant_type="nf4", compress_statistics=True
                )
                self.ab[l, k] = ad[p + "lora_A.weight"], ad[p + "lora_B.weight"]
                self.absmax[l, k] = (
                    w.view(-1, 64).abs().amax(1)
                )  # before nesting; nested() of it is what is stored
            self.norms[l, 1] = base[f"model.layers.{l}.input_layernorm.weight"].float()
            self.norms[l, 2] = base[f"model.layers.{l}.post_attention_layernorm.weight"].float()
        self.norms["f"] = base["model.norm.weight"].float()

    def w4(self, key):
        return F.dequantize_4bit(*self.q4[key]).float()

    def __getitem__(self, key):
        A, B = self.ab[key]
        return self.w4(key) + 2.0 * (B.float() @ A.float())  # lora_alpha / r = 2


class Merged:
    """Codes (kept as one byte here; four bits in the file), scales before nesting, norms."""

    def __init__(self, norms):
        self.idx, self.s, self.norms = {}, {}, {k: v.clone() for k, v in norms.items()}

    def __getitem__(self, key):
        return dequant(self.idx[key], nested(self.s[key]))


class Lookup:  # dequantise on demand, in a dtype
    def __init__(self, model, dtype, f=None):
        self.m, self.dt, self.f = model, dtype, f

    def __getitem__(self, key):
        return (self.f or self.m.__getitem__)(key).to(self.dt)


INV = 1.0 / THETA ** (torch.arange(0, HD, 2).float() / HD)


def rope(n, dt):
    f = torch.outer(torch.arange(n).float(), INV)
    f = torch.cat([f, f], -1)
    return f.cos().to(dt), f.sin().to(dt)


def rot(x, cs):
    h = HD // 2
    return x * cs[0] + torch.cat([-x[..., h:], x[..., :h]], -1) * cs[1]


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def attend(q, k, v):
    B, S = q.shape[:2]
    cs = rope(S, q.dtype)
    q, k, v = (t.view(B, S, -1, HD).transpose(1, 2) for t in (q, k, v))
    q, k = rot(q, cs), rot(k, cs)
    k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
    return T.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, S, -1)


def hidden(ids, W, norms, emb, dt):
    """Final hidden states; the residual stream and norms in float32, matmuls in dt."""
    h = emb[ids].float()
    for l in range(LAYERS):
        x = norm(h, norms[l, 1]).to(dt)
        h = (
            h
            + (
                attend(x @ W[l, "q"].t(), x @ W[l, "k"].t(), x @ W[l, "v"].t()) @ W[l, "o"].t()
            ).float()
        )
        x = norm(h, norms[l, 2]).to(dt)
        h = h + ((T.silu(x @ W[l, "g"].t()) * (x @ W[l, "u"].t())) @ W[l, "d"].t()).float()
    return norm(h, norms["f"])


@torch.no_grad()
def hiddens(ids, W, norms, emb, dt, bs=8):
    return torch.cat([hidden(i, W, norms, emb, dt) for i in ids.split(bs)])


@torch.no_grad()
def score(h, hl, ids, emb):
    """Loss and KL(live || merged) per token, float32."""
    E = emb.float()
    L = K = n = 0
    for a, b, y in zip(h, hl, ids):
        a, b = (torch.log_softmax(t[:-1].float() @ E.t(), -1) for t in (a, b))
        y = y[1:, None]
        L -= a.gather(1, y).sum().item()
        K += (b.exp() * (b - a)).sum().item()
        n += len(y)
    return L / n, K / n


# ---------------------------------------------------------------- 1. calibration, no gradients
def gptq(W, H, S, blk=64):
    """Codes for W (out, in) on the scales S (out, in); a column's error goes into the next ones."""
    n = W.shape[1]
    o = torch.argsort(H.diag(), descending=True)
    Hp = H[o][:, o].double()
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(Hp)), upper=True).float()
    Wt, St = (
        W.t()[o].contiguous(),
        S.t()[o].contiguous(),
    )  # rows are input channels: contiguous work
    idx = torch.zeros(Wt.shape, dtype=torch.uint8)
    for i in range(0, n, blk):
        j = min(i + blk, n)
        E = torch.zeros(j - i, len(W))
        for k in range(i, j):
            c = nearest(Wt[k] / St[k])
            idx[k] = c
            E[k - i] = e = (Wt[k] - NF4[c] * St[k]) / U[k, k]
            if k + 1 < j:
                Wt[k + 1 : j] -= U[k, k + 1 : j, None] * e[None]
        Wt[j:] -= U[i:j, j:].t() @ E
    return idx[torch.argsort(o)].t().contiguous()


def descend(idx, W, H, S, sweeps, blk=64):
    """Coordinate descent on tr((Q - W) H (Q - W)^T) over the codes, gradients updated by block."""
    St, idx = S.t().contiguous(), idx.t().contiguous()
    Q = NF4[idx.long()] * St
    G = H @ (Q - W.t())
    n = len(H)
    for _ in range(sweeps):
        for i in range(0, n, blk):
            j = min(i + blk, n)
            Gb, Hb, D = G[i:j].clone(), H[i:j, i:j], torch.zeros(j - i, Q.shape[1])
            for k in range(i, j):
                c = nearest((Q[k] - Gb[k - i] / Hb[k - i, k - i]) / St[k])
                q = NF4[c] * St[k]
                D[k - i] = d = q - Q[k]
                Q[k] = q
                idx[k] = c
                Gb += Hb[:, k - i, None] * d[None]
            G += H[:, i:j] @ D
    return idx.t().contiguous()


def refit(idx, W, H, s, ridge=1e-3):
    """Least-squares scales for fixed codes: an (in/64)^2 system a row, damped by the old ones."""
    C = NF4[idx.long()]
    R, n = C.shape
    nb = n // 64
    b = ((W @ H) * C).view(R, nb, 64).sum(2)
    A = torch.stack(
        [((C[:, i : i + 64] @ H[i : i + 64]) * C).view(R, nb, 64).sum(2) for i in range(0, n, 64)],
        1,
    )
    reg = ridge * A.diagonal(dim1=1, dim2=2)
    return torch.linalg.solve(A + torch.diag_embed(reg), b + reg * s.view(R, nb)).flatten()


@torch.no_grad()
def calibrate(live, ids, a):
    m = Merged(live.norms)
    hl = live.emb[ids].float()
    hm = hl.clone()
    lin = lambda x, w: x.to(BF) @ w.to(BF).t()
    for l in range(LAYERS):
        t = time.time()
        W = {k: live[l, k] for k in NAMES}
        Q = {}
        xl, xm = {}, {}
        for grp in GROUPS:
            g = grp[0]
            for h, w, x in (
                (hl, W, xl),
                (hm, Q, xm),
            ):  # this group's input, in the live and in the merged model
                if g in "qg":
                    x[g] = norm(h, live.norms[l, 1 if g == "q" else 2]).to(BF)
                elif g == "o":
                    x[g] = torch.cat(
                        [attend(*(lin(i, w[k]) for k in "qkv")) for i in x["q"].split(16)]
                    )
                else:
                    x[g] = torch.cat(
                        [T.silu(lin(i, w["g"])) * lin(i, w["u"]) for i in x["g"].split(16)]
                    )
            Wl = torch.cat([W[k] for k in grp])
            n = Wl.shape[1]
            H, C = torch.zeros(n, n), torch.zeros(n, n)
            D = torch.zeros(len(Wl), n) if g in "od" else 0.0
            wt = hl.pow(2).mean(2, keepdim=True).rsqrt() if g in "od" else torch.ones(1, 1, 1)
            wt = (wt / wt.pow(2).mean().sqrt()).expand(*hl.shape[:2], 1)
            for i in range(0, len(ids), 16):  # moments, a few sequences at a time
                sl = slice(i, i + 16)
                w = wt[sl].flatten(0, 1)
                y, x = (v[g][sl].flatten(0, 1).float() * w for v in (xl, xm))
                H += x.t() @ x
                C += (y - x).t() @ x
                if g in "od":
                    D += ((hl[sl] - hm[sl]).flatten(0, 1) * w).t() @ x
            N = ids.numel()
            H, C, D = H / N, C / N, D / N
            eye = torch.eye(n) * H.diag().mean()
            # W* = argmin E|W_live x_l (+ h_l - h_m) - W* x_m|^2 + cdamp |W* - W_live|^2
            W_star = (
                Wl
                + torch.linalg.solve((H + a.cdamp * eye).double(), (Wl @ C + D).t().double())
                .t()
                .float()
            )
            H = H + a.damp * eye
            R = len(Wl)
            ex = lambda v: v.view(R, -1).repeat_interleave(64, 1)
            cut = [live.absmax[l, k].numel() for k in grp]
            store = lambda s: torch.cat([nested(p) for p in s.split(cut)])
            raw = torch.cat([live.absmax[l, k] for k in grp])  # W4's own grid
            idx = gptq(W_star, H, ex(store(raw)))
            for _ in range(a.rounds):
                raw = refit(idx, W_star, H, store(raw))
                idx = descend(idx, W_star, H, ex(store(raw)), a.sweeps)
            for k, i, s in zip(grp, idx.split([len(W[k]) for k in grp]), raw.split(cut)):
                m.idx[l, k], m.s[l, k] = i.clone(), s.clone()
                Q[k] = m[l, k]
            if g in "od":
                hl, hm = hl + lin(xl[g], W[g]).float(), hm + lin(xm[g], Q[g]).float()
        e = ((hl - hm).pow(2).sum(2) / hl.pow(2).sum(2)).mean().sqrt()
        print(f"block {l}: {time.time() - t:.1f} s, stream's relative error {e:.4f}", flush=True)
    return m


# ---------------------------------------------------------------- 2. distil scales and norms
class KLHead(torch.autograd.Function):
    """Mean KL(live || merged) from final hidden states; logits of 256 tokens at a time."""

    @staticmethod
    def forward(ctx, h, ht, E):
        hb = h.to(BF)
        g = torch.empty_like(hb)
        tot = 0.0
        for i in range(0, len(hb), 256):
            ls, lt = (torch.log_softmax((t[i : i + 256] @ E.t()).float(), -1) for t in (hb, ht))
            p = lt.exp()
            tot += (p * (lt - ls)).sum().item()
            g[i : i + 256] = ((ls.exp() - p) / len(hb)).to(BF) @ E
        ctx.save_for_backward(g)
        return torch.tensor(tot / len(hb))

    @staticmethod
    def backward(ctx, go):
        return ctx.saved_tensors[0].float() * go, None, None


def tune(m, ids, teacher, emb, a):
    t0 = time.time()
    C = {k: NF4[i.long()] for k, i in m.idx.items()}
    W = {k: dequant(m.idx[k], nested(m.s[k]), BF).requires_grad_() for k in C}
    for v in m.norms.values():
        v.requires_grad_()
    P = {
        ("s", *k): (s, s.abs().clone(), a.lr) for k, s in m.s.items()
    }  # value, unit, relative rate
    P |= {("n", k): (v, v.detach().abs().mean(), a.lr_norm) for k, v in m.norms.items()}
    M = {k: (torch.zeros_like(p[0]), torch.zeros_like(p[0])) for k, p in P.items()}
    gen = torch.Generator().manual_seed(0)
    order = []
    hist = []
    for i in range(1, a.steps + 1):
        if len(order) < a.bs:
            order = torch.randperm(len(ids), generator=gen).tolist()
        b, order = order[: a.bs], order[a.bs :]
        loss = KLHead.apply(
            hidden(ids[b], W, m.norms, emb, BF).flatten(0, 1), teacher[b].flatten(0, 1), emb
        )
        loss.backward()
        # The rate falls to 0 when the steps or the minutes are spent, whichever comes first.
        used = max(i / a.steps, (time.time() - t0) / 60 / a.minutes)
        f = min(1, i / 10) * 0.5 * (1 + math.cos(math.pi * min(1, used)))
        with torch.no_grad():
            for k, (p, unit, lr) in P.items():
                g = (
                    (W[k[1:]].grad.float() * C[k[1:]]).view(-1, 64).sum(1)
                    if k[0] == "s"
                    else p.grad
                )  # straight through nested()
                m1, m2 = M[k]
                m1.lerp_(g, 0.1)
                m2.lerp_(g * g, 0.02)
                p -= lr * f * unit * (m1 / (1 - 0.9**i)) / ((m2 / (1 - 0.98**i)).sqrt() + 1e-12)
                if k[0] == "s":
                    W[k[1:]].data = dequant(m.idx[k[1:]], nested(p), BF)
                    W[k[1:]].grad = None
                else:
                    p.grad = None
        hist.append(loss.item())
        if i % 20 == 0:
            print(
                f"step {i}: train KL {sum(hist[-20:]) / 20:.5f}, "
                f"{(time.time() - t0) / i:.2f} s a step, {rss():.2f} GiB",
                flush=True,
            )
        if used >= 1:
            break
    m.norms = {k: v.detach().to(BF).float() for k, v in m.norms.items()}  # as the file stores them
    return i, sum(hist[-20:]) / len(hist[-20:])


# ---------------------------------------------------------------- end to end
def main():
    ap = argparse.ArgumentParser()
    for name in ("base", "adapter", "tokens"):
        ap.add_argument(name)
    ap.add_argument("--seqs", type=int, default=256)
    ap.add_argument("--damp", type=float, default=0.003)
    ap.add_argument("--cdamp", type=float, default=0.02)
    ap.add_argument("--rounds", type=int, default=4)
    ap.add_argument("--sweeps", type=int, default=2)
    ap.add_argument("--steps", type=int, default=200)
    ap.add_argument("--minutes", type=float, default=10)
    ap.add_argument("--bs", type=int, default=4)
    ap.add_argument("--lr", type=float, default=1.5e-4)
    ap.add_argument("--lr_norm", type=float, default=5e-5)
    ap.add_argument("--threads", type=int, default=2)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    t0 = time.time()
    print(vars(a))
    live = Live(a.base, a.adapter)
    tok = {k: v.long() for k, v in load_file(a.tokens).items()}
    print(f"load {time.time() - t0:.0f} s {rss():.2f} GiB")
    held = tok["heldout"]
    lw = Lookup(live, torch.float32)
    hl = hiddens(held, lw, live.norms, live.emb, torch.float32)
    l_live, _ = score(hl, hl, held, live.emb)
    l_base, k_base = score(
        hiddens(held, Lookup(live, torch.float32, live.w4), live.norms, live.emb, torch.float32),
        hl,
        held,
        live.emb,
    )

    def report(m, what, t):
        l, k = score(
            hiddens(held, Lookup(m, torch.float32), m.norms, live.emb, torch.float32),
            hl,
            held,
            live.emb,
        )
        gain = 100 * (l_base - l) / (l_base - l_live)
        row = f"| {what} | {t:.0f} | {l:.4f} | {gain:.2f} % | {k:.5f} | {rss():.1f} |"
        print(row, flush=True)

    print(f"live {l_live:.4f} base4 {l_base:.4f} KL {k_base:.4f}, {rss():.2f} GiB")
    pick = torch.randperm(len(tok["calibration"]), generator=torch.Generator().manual_seed(0))[
        : a.seqs
    ]
    t1 = time.time()
    m = calibrate(live, tok["calibration"][pick], a)
    t2 = time.time()
    report(m, f"calibrated {a.seqs} seqs", t2 - t1)
    if a.steps:
        t3 = time.time()
        teacher = hiddens(tok["calibration"], Lookup(live, BF), live.norms, live.emb, BF).to(BF)
        n, kl = tune(m, tok["calibration"], teacher, live.emb, a)
        t4 = time.time()
        report(
            m,
            f"then tuned {n}x{a.bs} lr {a.lr:g}/{a.lr_norm:g}, train KL {kl:.5f}",
            t2 - t1 + t4 - t3,
        )
    for k in m.idx:  # what bitsandbytes makes of the file is what was scored
        assert torch.equal(
            F.dequantize_4bit(*pack(m.idx[k], m.s[k])).view(m[k].shape).float(), m[k]
        ), k
    print("packed: all 210 weights dequantise to what was scored")


if __name__ == "__main__":
    main()
