"""What a person sees at the end of a run: how well it learnt, a sample, and what to do next."""

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from mixtral_jax.config import Config
from mixtral_jax.evaluation.perplexity import Result, uniform_nats, unigram_nats
from mixtral_jax.evaluation.results import measure_with_progress, results_table
from mixtral_jax.evaluation.scoring import make_scorer
from mixtral_jax.inference.decoding import make_generator, obstacle
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.inference.text import Prompt, complete_texts
from mixtral_jax.model.mixtral import Arrays
from mixtral_jax.training.trainer import Outcome

PROMPT_TOKENS = 32
NEW_TOKENS = 96
TEMPERATURE = 0.8


def summarize(config: Config, outcome: Outcome, console: Console) -> None:
    """Measures the held-out text beside two simple models, samples one continuation and names the next commands."""
    if not outcome.finished:
        console.print(
            f"stopped at step {outcome.step} of {config.train.steps}; the same command goes on", soft_wrap=True
        )
        return
    if any(documents.num_documents for documents in outcome.text.held_out):
        arrays = outcome.architecture.merge(outcome.state.arrays)
        if config.objective.name != "preference":
            _show_perplexity(config, outcome, arrays, console)
        _show_sample(config, outcome, arrays, console)
    talk = f"  talk to it      python -m mixtral_jax serve {config.run_dir}\n"
    measure = f"  measure it      python eval.py {config.run_dir}\n"
    console.print(
        Text.assemble(
            ("the run lies in ", ""), (config.run_dir, "bold"), "\n",
            {"pretrain": measure, "sft": measure + talk, "preference": talk}[config.objective.name],
            f"  look at it      tensorboard --logdir {config.run_dir}/tensorboard\n",
            f"  train longer    the same command with train.steps={2 * max(config.train.steps, outcome.step)}",
        ),
        soft_wrap=True,
    )  # fmt: skip


def _show_perplexity(config: Config, outcome: Outcome, arrays: Arrays, console: Console) -> None:
    pairs = [pair for pair in zip(outcome.text.training, outcome.text.held_out, strict=True) if pair[1].num_documents]
    texts = [heldout for _, heldout in pairs]
    score = make_scorer(outcome.architecture)(arrays)
    evaluation = measure_with_progress(score, texts, config.eval, config.data.seq_len)
    total = evaluation.total
    nats = {
        "unigram": sum(unigram_nats(a, b, config.model.vocab_size, config.eval.max_tokens) for a, b in pairs),
        "uniform": sum(uniform_nats(b, config.model.vocab_size, config.eval.max_tokens) for b in texts),
    }
    baselines = {name: Result(total.tokens, total.bytes, sum_) for name, sum_ in nats.items()}
    console.print(results_table(evaluation, baselines))


def _show_sample(config: Config, outcome: Outcome, arrays: Arrays, console: Console) -> None:
    if problem := obstacle(outcome.architecture):
        console.print(f"no sample: {problem}", soft_wrap=True)
        return
    tokenizer = outcome.text.tokenizer
    documents = next(documents for documents in outcome.text.held_out if documents.num_documents)
    prompt_tokens = PROMPT_TOKENS if documents.format == "text" else int(documents.counts(0).argmax())
    tokens = [int(token) for token in documents.tokens(0)[:prompt_tokens]]
    prompt = Prompt(tokens, Sampling(temperature=TEMPERATURE, seed=config.seed), NEW_TOKENS)
    generate = make_generator(outcome.architecture)(arrays)
    (sample,) = complete_texts(generate, tokenizer, [prompt], rows=1, context=prompt_tokens + NEW_TOKENS)
    text = Text.assemble((tokenizer.decode(tokens), "dim"), (sample.text, "bold"))
    title = f"held-out text, then {len(sample.tokens)} sampled tokens (temperature {TEMPERATURE})"
    console.print(Panel(text, title=title))
