"""Alignment in small: a toy that thinks step by step, and is rewarded for answers that are right.

The task is arithmetic modulo 10, from left to right, which nobody can do at a glance but anyone can
do one step at a time. A thought has one line per step; that is all the reasoning there is:

    7*3-4+8        <think>          every problem is drawn from a seed; a hash of its text decides
                   7*3=1            whether it is for training or for tests, so that no test problem
                   1-4=7            is ever trained on; the verifier compares one digit.
                   7+8=5
                   </think>5

SFT, supervised fine-tuning (Nano 2, arXiv 2508.14444, section 3): cross-entropy on what the
assistant says, given what the user asked. Some thoughts are empty, for /no_think, and some are cut
short with the right answer kept, so that the model answers whenever its thought is closed: this is
what lets a budget be set when the model is used (infer.py, `ThinkingBudget`).

GRPO (DeepSeekMath, arXiv 2402.03300): sample G answers to each of several problems, reward each,
and make what was better than its group's mean more likely:

    A_i  = (r_i - mean r) / (std r + eps)         advantage of sample i, the same for its tokens
    rho  = pi(token) / pi_old(token)              1 until the first update on these samples
    loss = -mean over tokens of min(rho A, clip(rho, 1 - e, 1 + e) A)
           + beta KL(pi || pi_ref),               k3 = exp(d) - d - 1 with d = log pi_ref - log pi

There is no value network: the group's mean is the baseline. Groups whose answers all earn the same
have advantage 0 and are left out. Clipping takes the gradient away from a token that has moved far
enough. The mean is over all tokens of the batch (both as in DAPO, arXiv 2503.14476); a mean per
sample first would favour long wrong answers (Dr. GRPO, arXiv 2503.20783). beta is 0 by default, as
there. The reward is 1 for the right answer and a tenth for the form. The last step is the paper's:
the mean of the weights before and after RL.

Glossary: as in model.py. rollout: groups of samples that are learned from | group: the samples of
one problem | logp: log-probability of a token that was said | budget: tokens of a thought, here as
lines | text: the corpus of pre-training, mixed in so that it is not forgotten

Left out: DPO, RLHF, a value network, asynchronous samplers, several GPUs.

    python align.py                    out/base -> out/aligned, 3 to 13 min on 2 cores
    python align.py --eval FOLDER      accuracy of any run folder, by budget
    python -m bench.align              seeds; against a transformer and a pure Mamba of equal size
"""

import copy
import dataclasses
import functools
import hashlib
import pathlib

import numpy as np
import torch
from matplotlib.figure import Figure

import train_fp8
from common import (check_flags, flag, pick_device, pick_dtype, script, settings_of,
                    start_processes)
from data import Batches, load_data
from infer import (ASSISTANT, END_THINK, END_TURN, SYSTEM, THINK, USER, Row, Settings, load_run,
                   message_ids, start_rows, stream_rows)
from model import save_hf
from ssm import accumulator
from train_fp8 import Job, check_memory, train_in_folder

# ------------------------------------------------------------------------------------------------
# The task


@dataclasses.dataclass(frozen=True)
class Problem:
    """A chain of operations, the lines that work it out, and its answer, one digit."""
    text: str
    lines: tuple
    answer: str


def make_problem(rng, length):
    """A Problem of so many operations, drawn by a numpy Generator."""
    digits, signs = rng.integers(10, size=length + 1), rng.choice(list("+-*"), length)
    text, value, lines = str(digits[0]), int(digits[0]), []
    for sign, digit in zip(signs, digits[1:].tolist()):
        result = dict(zip("+-*", (value + digit, value - digit, value * digit)))[sign] % 10
        lines.append(f"{value}{sign}{digit}={result}")
        text, value = f"{text}{sign}{digit}", result
    return Problem(text, tuple(lines), str(value))


def is_test(problem):
    """A tenth of all problems, by their text, are for tests alone."""
    return hashlib.sha256(problem.text.encode()).digest()[0] % 10 == 0


def draw_problems(rng, n, lengths, test=False):
    """n Problems of these lengths in turn, for training or for tests."""
    problems = []
    while len(problems) < n:
        problem = make_problem(rng, lengths[len(problems) % len(lengths)])
        if is_test(problem) == test:
            problems.append(problem)
    return problems


def prompt_ids(encoding, problem, thinking=True):
    """A chat's first turn with this problem, up to where the model speaks."""
    opening = THINK + ("\n" if thinking else END_THINK)
    return [*message_ids(encoding, SYSTEM, ""),
            *message_ids(encoding, USER, problem.text, ASSISTANT), *encoding.encode(opening)]


def answer_ids(encoding, problem, kept):
    """What the model should say: the first `kept` lines of thought, None for no thought at all."""
    thought = [] if kept is None else [
        *encoding.encode_ordinary("".join(line + "\n" for line in problem.lines[:kept])),
        *encoding.encode(END_THINK)]
    return [*thought, *encoding.encode_ordinary(problem.answer + "\n"), *encoding.encode(END_TURN)]


def verify(problem, said):
    """(reward, right, well formed) of what a model said after its prompt, markers included: one
    thought that is closed, then one digit, then the end of the turn."""
    thought, closed, rest = said.partition(END_THINK)
    answer, ended, _ = rest.partition(END_TURN)
    formed = bool(closed and ended) and len(answer.strip()) == 1
    right = formed and answer.strip() == problem.answer
    return right + 0.1 * formed, right, formed


# ------------------------------------------------------------------------------------------------
# Supervised fine-tuning


class Conversations:
    """Rows of problems with their answers, packed one after the other, and rows of text. Only what
    the assistant says has labels. `position`, the rows taken so far, is the whole state."""

    def __init__(self, encoding, run, text, seq_len):
        self.encoding, self.run, self.seq_len, self.position = encoding, run, seq_len, 0
        self.text_rows = round(run.text_share * run.batch_size)
        self.text = Batches(text, self.text_rows, seq_len, run.seed) if self.text_rows else None

    def next(self):
        """(tokens, labels, seq_idx), int64 (b, seq_len), documents kept apart by seq_idx."""
        run, rows = self.run, []
        for i in range(run.batch_size - self.text_rows):
            rng = np.random.default_rng((run.seed, self.position + i))
            rows.append(self.pack(rng, self.seq_len + 1))
        ids, said, doc = (torch.tensor(m) for m in zip(*rows))
        batch = [ids[:, :-1], torch.where(said, ids, -100)[:, 1:], doc[:, :-1]]
        if self.text:
            self.text.position = self.position // run.batch_size * self.text_rows
            tokens, labels, _ = self.text.next()
            more = tokens, labels, torch.zeros_like(tokens)
            batch = [torch.cat(pair) for pair in zip(batch, more)]
        self.position += run.batch_size
        return batch

    def pack(self, rng, n):
        """n ids of conversations, whether the assistant says each, and their numbers."""
        ids, said, doc = [], [], []
        while len(ids) < n:
            [problem] = draw_problems(rng, 1, [rng.choice(self.run.lengths)])
            how, kept = rng.random(), len(problem.lines)
            if how < self.run.empty + self.run.cut:
                kept = None if how < self.run.empty else int(rng.integers(kept))
            prompt = prompt_ids(self.encoding, problem, kept is not None)
            answer = answer_ids(self.encoding, problem, kept)
            doc += [doc[-1] + 1 if doc else 0] * (len(prompt) + len(answer))
            ids, said = ids + prompt + answer, said + [False] * len(prompt) + [True] * len(answer)
        return ids[:n], said[:n], doc[:n]


# ------------------------------------------------------------------------------------------------
# Answers: sampled, verified, counted


def answer_all(model, encoding, problems, settings, thinking=True, samples=1, seed=0):
    """[(prompt ids, ids that were said, text)] for `samples` answers to each problem, one batch."""
    settings = dataclasses.replace(settings, stop=(END_TURN,))
    prompts = [prompt_ids(encoding, problem, thinking) for problem in problems]
    longest, opened = max(map(len, prompts)), "" if thinking else END_THINK
    model.eval()
    cache = model.init_cache(len(problems) * samples, longest + settings.tokens)
    logits = start_rows(model, prompts, cache, samples=samples)
    rows = [Row(encoding, ids, seed + i * samples + j, settings, settings.tokens, logits.device,
                model.config.end_tokens)
            for i, ids in enumerate(prompts) for j in range(samples)]
    for _ in stream_rows(model, rows, cache, logits, {}):
        pass
    model.train()
    said = [row.ids[len(prompts[i // samples]):] for i, row in enumerate(rows)]
    return [(prompts[i // samples], ids, opened + encoding.decode(ids))
            for i, ids in enumerate(said)]


def tokens_per_line(encoding):
    return len(encoding.encode_ordinary("1+1=2\n"))


def accuracy(model, encoding, problems, budget=None):
    """The share of problems that are answered right with thoughts of `budget` lines (0: none, None:
    any), and the texts. Sampled as the paper does: thoughts at temperature 0.6 and top-p 0.95, else
    greedy. A budget is in tokens: a thought is closed at the first newline after so many."""
    longest, line = max(len(p.lines) for p in problems), tokens_per_line(encoding)
    settings = Settings(tokens=(longest + 2) * line + 8, temperature=0 if budget == 0 else 0.6,
                        top_p=0.95, think_budget=(budget - 1) * line + 1 if budget else -1)
    texts = [text for i in range(0, len(problems), 128) for _, _, text in answer_all(
        model, encoding, problems[i:i + 128], settings, thinking=budget != 0)]
    right = [verify(problem, text)[1] for problem, text in zip(problems, texts)]
    return sum(right) / len(right), texts


def accuracies(model, encoding, problems):
    """{lines of thought: accuracy}, from none to as many as the longest problem has."""
    longest = max(len(problem.lines) for problem in problems)
    return {lines: accuracy(model, encoding, problems, lines)[0] for lines in range(longest + 1)}


def look_for_hacks(problems, texts):
    """Shares of right answers that the thought did not earn: without one, and after a wrong one."""
    right = [(p, text.partition(END_THINK)[0].split()) for p, text in zip(problems, texts)
             if verify(p, text)[1]]
    count = max(len(right), 1)
    return dict(no_thought=sum(not thought for _, thought in right) / count,
                wrong_thought=sum(bool(thought) and tuple(thought) != p.lines
                                  for p, thought in right) / count)


# ------------------------------------------------------------------------------------------------
# Group relative policy optimisation


def logps(model, tokens, labels):
    """Log-probabilities of the labels that are not below 0, in order: fp32 (n,)."""
    kept = labels >= 0
    h = model(tokens, head=False)[kept]                                     # (n, d)
    logits = model.lm_head(h).to(accumulator(h))                            # (n, v)
    return logits.log_softmax(-1).gather(1, labels[kept][:, None])[:, 0]


def group_advantages(rewards, eps=1e-4):
    """rewards (problems, G) -> how much better each is than its group, in standard deviations."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps)


def grpo_loss(logp, old, advantage, clip, reference=None, beta=0.0):
    """The objective of the header for tokens (n,): their logp now, when they were sampled, their
    sample's advantage, and their logp in the reference model, if beta is not 0."""
    rho = (logp - old).exp()
    gain = torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)
    if beta:
        d = reference - logp
        gain = gain - beta * (d.exp() - d - 1)
    return -gain.mean()


class Rollouts:
    """Batches for GRPO: each rollout is sampled from the model as it is then, and learned from in
    `updates` steps. notes["rollout"] holds the one in use, so that a checkpoint resumes within
    it."""

    def __init__(self, model, reference, encoding, run, notes):
        self.model, self.reference, self.encoding, self.run = model, reference, encoding, run
        self.notes, self.position = notes, 0

    def next(self):
        """tokens and labels (b, t), and (b, t, 3): advantage, old logp, reference logp."""
        run, rows = self.run, self.run.problems * self.run.samples
        number, start = divmod(self.position, rows)
        if self.notes.get("number") != number:
            self.notes.update(number=number, rollout=self.sample(number))
        self.position += rows // run.updates
        part = start * run.updates // rows
        return [m.tensor_split(run.updates)[part] for m in self.notes["rollout"]]

    @torch.no_grad()
    def sample(self, number):
        run, device = self.run, self.model.lm_head.weight.device
        rng = np.random.default_rng((run.seed, 1, number))
        problems = draw_problems(rng, run.problems, run.lengths)
        settings = Settings(tokens=(max(run.lengths) + 2) * tokens_per_line(self.encoding) + 8,
                            temperature=1.0, top_p=1.0)
        answers = answer_all(self.model, self.encoding, problems, settings, samples=run.samples,
                             seed=int(rng.integers(2 ** 62)))
        scores = [verify(problems[i // run.samples], text)
                  for i, (_, _, text) in enumerate(answers)]
        rewards = torch.tensor([float(s[0]) for s in scores]).view(run.problems, run.samples)
        advantages = group_advantages(rewards).flatten()
        self.notes.setdefault("right", []).append(sum(s[1] for s in scores) / len(scores))

        # Groups that disagree, in an order that spreads each over the updates. Where all answers
        # earn the same nothing can be learned. Padding has no labels.
        differ = (rewards.amax(1) > rewards.amin(1)).repeat_interleave(run.samples)
        order = sorted(rng.permutation(len(answers)).tolist(), key=lambda i: not differ[i])
        order = order[:max(int(differ.sum()), run.updates)]
        longest = max(len(answers[i][0]) + len(answers[i][1]) for i in order)
        tokens = torch.zeros(len(order), longest, dtype=torch.int64)
        labels, extra = torch.full_like(tokens, -100), torch.zeros(*tokens.shape, 3)
        for row, i in enumerate(order):
            prompt, said, _ = answers[i]
            ids = torch.tensor([*prompt, *said])
            tokens[row, :len(ids) - 1], labels[row, len(prompt) - 1:len(ids) - 1] = \
                ids[:-1], ids[len(prompt):]
            extra[row, :, 0] = advantages[i]
        tokens, labels, extra = tokens[:, :-1], labels[:, :-1], extra[:, :-1]
        for part, model in ((1, self.model), (2, self.reference)):
            for i in range(0, len(tokens) if model else 0, 32):
                t, m = tokens[i:i + 32].to(device), labels[i:i + 32].to(device)
                extra[i:i + 32, :, part][m >= 0] = logps(model, t, m).cpu()
        return tokens, labels, extra


def make_grpo_loss(run):
    """The loss_fn for `train` on Rollouts."""
    def loss_fn(model, tokens, labels, extra):
        advantage, old, reference = extra[labels >= 0].unbind(-1)
        return grpo_loss(logps(model, tokens, labels), old, advantage, run.clip, reference, run.kl)
    return loss_fn


# ------------------------------------------------------------------------------------------------
# The run

SEQ_LEN, TESTS = 256, 200       # tokens per row of SFT; test problems, of all lengths
OF_RL = "rl_steps rl_lr problems samples updates clip kl".split()       # flags that SFT ignores
EVAL_TOKENS = 24576             # of the validation text


@dataclasses.dataclass
class Run:
    """Teach a trained model to reason about a task: SFT, then GRPO, then the mean of both."""

    base: str = flag("out/base", "run folder of train_fp8.py", session=True)
    data: str = flag("stdlib", "text that is not to be forgotten, as in training", session=True)
    lengths: tuple[int, ...] = flag((2, 3, 4), "operations of a problem", nargs="+", at_least=1)
    sft_steps: int = flag(420, "optimizer steps of SFT", at_least=1)
    rl_steps: int = flag(60, "optimizer steps of GRPO", at_least=1)
    batch_size: int = flag(8, "rows per step of SFT", at_least=1)
    text_share: float = flag(0.125, "of the rows: text", at_least=0, at_most=0.5)
    empty: float = flag(0.1, "of the conversations: without a thought", at_least=0, at_most=1)
    cut: float = flag(0.3, "of the conversations: a thought cut short", at_least=0, at_most=1)
    lr: float = flag(3e-3, "peak learning rate of SFT", above=0)
    rl_lr: float = flag(1e-4, "peak learning rate of GRPO", above=0)
    problems: int = flag(24, "groups sampled per rollout", at_least=1)
    samples: int = flag(8, "answers per group", at_least=2)
    updates: int = flag(2, "steps on each rollout", at_least=1)
    clip: float = flag(0.2, "largest change of a ratio that is rewarded", above=0, at_most=1)
    kl: float = flag(0.0, "weight of KL(model || SFT model)", at_least=0)
    seed: int = flag(0, "of problems, samples and order", at_least=0, at_most=2 ** 62)
    device: str = flag("auto", "auto, cuda, mps or cpu", session=True)
    compute_dtype: str = flag("auto", "float32 or bfloat16; auto: bfloat16 where it is fast",
                              choices=("auto", "float32", "bfloat16"))
    out: str = flag("out/aligned", "run folder; SFT goes to its subfolder sft", session=True)
    overwrite: bool = flag(False, "start anew even if --out holds another run", session=True)
    stop_after: int = flag(0, "stop, resumable, after so many steps", at_least=0, session=True)
    eval: str = flag("", "print the accuracy of this folder, and train nothing", session=True)

    def __post_init__(self):
        check_flags(self)
        if self.empty + self.cut > 1:
            raise ValueError(f"--empty {self.empty} + --cut {self.cut} must be at most 1")
        if self.problems * self.samples % self.updates:
            raise ValueError(f"--problems x --samples, {self.problems * self.samples}, must be a "
                             f"multiple of --updates {self.updates}")
        if pathlib.Path(self.out).resolve() == pathlib.Path(self.base).resolve():
            raise ValueError(f"--out and --base are both {self.out}: the model would take the "
                             "place of the one it was made from")

    def training(self, stage):
        """The train_fp8.Run of stage "sft" or "rl"."""
        common = dict(recipe="none", data=self.data, seed=self.seed, device=self.device,
                      seq_len=SEQ_LEN, overwrite=self.overwrite, stop_after=self.stop_after)
        if stage == "sft":
            return train_fp8.Run(steps=self.sft_steps, batch_size=self.batch_size, lr=self.lr,
                                 out=str(pathlib.Path(self.out) / "sft"), warmup=0.05, decay=0.5,
                                 eval_every=self.sft_steps, **common)
        return train_fp8.Run(steps=self.rl_steps, lr=self.rl_lr, out=self.out, warmup=0.0,
                             batch_size=self.problems * self.samples // self.updates, decay=0.5,
                             eval_every=self.rl_steps, **common)


def load_start(run, folder, state):
    """(model with fp32 masters, its encoding, the text in its tokens) of a folder."""
    device = pick_device(run.device)
    model, encoding = load_run(folder, device)
    if END_TURN not in encoding.special_tokens_set or THINK not in encoding.special_tokens_set:
        raise ValueError(f"{folder}: the tokenizer has no {END_TURN} or {THINK}, the markers of a "
                         "chat: train the base anew")
    tokenizer_json = (pathlib.Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
    text = load_data(run.data, tokenizer_json=tokenizer_json)
    if text.tokenizer_json != tokenizer_json:
        raise ValueError(f"the tokens of --data {run.data} are not those of {folder}: another "
                         "tokenizer wrote them")
    model.compute_dtype = pick_dtype(state["compute_dtype"] if state else run.compute_dtype, device)
    return model.float().train(), encoding, text


def fingerprint(model):
    """A short text that tells models apart, of the first values of every parameter."""
    first = torch.cat([p.detach().flatten()[:16].float().cpu() for p in model.parameters()])
    return hashlib.sha256(repr(model.config).encode() + first.numpy().tobytes()).hexdigest()[:16]


def tests_of(run):
    return draw_problems(np.random.default_rng((run.seed, 2)), TESTS, run.lengths, test=True)


def build_sft(run, training, state):
    """The Job of the first stage."""
    model, encoding, text = load_start(run, run.base, state)
    notes = state["notes"] if state else dict(
        base=accuracy(model, encoding, tests_of(run))[0])
    print(f"SFT          {run.base}: answers {notes['base']:.1%} of the test problems; "
          f"{training.steps} steps of {training.batch_size} x {training.seq_len} tokens, a share "
          f"of {run.text_share:g} text")
    check_memory(training, model.config, model.compute_dtype, pick_device(run.device))
    return Job(model, text, batches=Conversations(encoding, run, text.train, SEQ_LEN),
               notes=notes, eval_tokens=EVAL_TOKENS)


def report_sft(run, training, job, rows, val_loss):
    score, _ = accuracy(job.model, job.token_data.encoding, tests_of(run))
    print(f"SFT          {score:.1%} of the test problems, text {val_loss:.3f} nats per token")
    return dict(accuracy_base=job.notes["base"], accuracy_sft=score, sft_val_loss=val_loss)


def build_rl(run, sft, training, state):
    """The Job of the second stage."""
    model, encoding, text = load_start(run, sft, state)
    notes = state["notes"] if state else {}
    reference = copy.deepcopy(model).requires_grad_(False) if run.kl else None
    print(f"GRPO         {training.steps} steps, {run.problems} x {run.samples} answers for every "
          f"{run.updates}")
    return Job(model, text, make_grpo_loss(run),
               Rollouts(model, reference, encoding, run, notes), EVAL_TOKENS, notes)


def merge(a, b, alpha):
    """A model whose parameters are (1 - alpha) a + alpha b (Nano 2 merges two at 0.5)."""
    if a.config != b.config:
        raise ValueError(f"two configurations cannot be merged: {a.config} and {b.config}")
    merged = copy.deepcopy(a)
    with torch.no_grad():
        for p, q in zip(merged.parameters(), b.parameters()):
            p.lerp_(q.to(p.dtype), alpha)
    return merged


def report_rl(run, sft, before, training, job, rows, val_loss):
    """Merge, save, count: the tables, the plot and the last line's values."""
    encoding, problems = job.token_data.encoding, tests_of(run)
    rl, texts = accuracy(job.model, encoding, problems)
    model = merge(load_run(sft, pick_device(run.device))[0].float(), job.model, 0.5)
    save_hf(model, run.out)
    hacks, by_budget = look_for_hacks(problems, texts), accuracies(model, encoding, problems)
    print(f"\n{'':14s}{'accuracy':>9s}")
    stages = dict(base=before["accuracy_base"], sft=before["accuracy_sft"], rl=rl,
                  merged=by_budget[max(by_budget)])
    for name, score in stages.items():
        print(f"{name:14s}{score:9.1%}")
    print(f"of the right answers after RL {hacks['no_thought']:.1%} had no thought, "
          f"{hacks['wrong_thought']:.1%} a wrong one\n\n{'lines of thought':16s}{'accuracy':>9s}")
    for lines, score in by_budget.items():
        print(f"{lines:16d}{score:9.1%}")
    path = pathlib.Path(run.out) / "accuracy.png"
    plot_accuracy(stages, by_budget, path)
    print(f"plot         {path}\nexample      {problems[-1].text}: "
          + texts[-1].replace("\n", " "))
    return dict({f"accuracy_{name}": score for name, score in stages.items()},
                accuracy_by_budget=by_budget, val_loss=val_loss, **hacks, lengths=run.lengths,
                rollouts=job.notes["right"], out=run.out)


def plot_accuracy(stages, by_budget, path):
    """Accuracy by stage, and by lines of thought."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(list(stages), [100 * score for score in stages.values()], color="#4c72b0")
    left.set(title="First it learns to think, then to be right", ylim=(0, 100),
             ylabel="test problems answered right [%]")
    right.plot(list(by_budget), [100 * score for score in by_budget.values()], "o-",
               color="#c44e52")
    right.set(title="Each line of thought adds accuracy", xlabel="budget [lines of thought]",
              ylim=(0, 100), xticks=list(by_budget))
    figure.savefig(path, dpi=120)


def show_accuracy(run):
    """--eval: the accuracy of a folder by budget, without training."""
    model, encoding = load_run(run.eval, pick_device(run.device))
    problems = tests_of(run)
    score, texts = accuracy(model, encoding, problems)
    by_budget = accuracies(model, encoding, problems)
    print(f"{run.eval}: {score:.1%} of {len(problems)} test problems with any thought; by lines: "
          + ", ".join(f"{lines}: {share:.1%}" for lines, share in by_budget.items()))
    return dict(accuracy=score, accuracy_by_budget=by_budget, **look_for_hacks(problems, texts))


@script(Run)
def main(run):
    if run.eval:
        return show_accuracy(run)
    device = pick_device(run.device)
    if start_processes(device)[1] > 1:
        raise ValueError("alignment runs in one process: start it without torchrun")
    sft, settings = run.training("sft"), settings_of(run) | dict(
        base=fingerprint(load_run(run.base, device)[0]))
    before = {name: value for name, value in settings.items() if name not in OF_RL}
    first = train_in_folder(sft, functools.partial(build_sft, run),
                            functools.partial(report_sft, run), before)
    if "accuracy_sft" not in first:             # stopped
        return first
    return train_in_folder(run.training("rl"), functools.partial(build_rl, run, sft.out),
                           functools.partial(report_rl, run, sft.out, first),
                           settings)


if __name__ == "__main__":
    main()
