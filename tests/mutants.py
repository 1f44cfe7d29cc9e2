"""The mistakes that `python -m tests.mutation` plants, one at a time: file, tests that should notice, old and new text.

Every old text stands exactly once in its file; `tests/test_mutants.py` sees to that.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One mistake."""

    file: str  # below mixtral_jax/
    old: str
    new: str
    tests: str  # below tests/: files, or file::name


STEP = "training/test_step.py::test_"
LOOP = "training/test_loop.py::test_"
EXCHANGES = "model/test_exchanges.py::test_"
STARTS = "training/test_starting_point.py::test_"
CACHE = "data/test_token_cache.py::test_a_cache_"
DRILLS = "runs/test_drills.py::test_"
MOE = "model/test_moe.py::test_"
TABLE: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("training/preferences.py", "training/test_preferences.py"): [
        ("smooth * log_sigmoid(-logits)", "smooth * log_sigmoid(logits)"),
        ("1 / (2 * config.beta)", "1 / config.beta"),
        ("worse.point - worse.ratio", "worse.ratio - worse.point"),
        ("return sums[:, 1::2], sums[:, 2::2]", "return sums[:, 2::2], sums[:, 1::2]"),
        ("jnp.where(batch.loss_mask, values, 0)", "values"),
    ],
    ("data/record_rows.py", "data/test_answers.py"): [
        ("= self._marks[places[1:]] & ANSWER", "= self._marks[places[:-1]] & ANSWER"),
        ("2 * unit + 1 + worse if", "2 * unit + 2 - worse if"),
        ("left = rooms[place]", "left = rooms[-1]"),
    ],
    ("training/losses.py", f"training/test_losses.py {STEP}the_losses_are_those_worked_out_by_hand"): [
        ("jnp.sum(batch.loss_mask, dtype=FULL)", "jnp.sum(batch.segment_ids > 0, dtype=FULL)"),
        ("valid = (batch.segment_ids > 0)", "valid = (batch.segment_ids >= 0)"),
        ("entropy = logsumexp - jnp.sum", "entropy = logsumexp + jnp.sum"),
        ("jnp.square(logsumexp), valid", "jnp.abs(logsumexp), valid"),
        ("return num_experts * jnp.mean(jnp.sum", "return num_experts * jnp.sum(jnp.sum"),
        ("return num_experts * jnp.mean", "return jnp.mean"),
        ("jax.lax.stop_gradient(load) * probs", "load * probs"),
        ("router_z = jnp.mean(sums", "router_z = jnp.sum(sums"),
        ("jnp.maximum(counts.targets, 1)\n", "jnp.maximum(counts.tokens, 1)\n"),
        ("jnp.mean(sums.logsumexp_squared) / jnp.maximum(counts.tokens, 1)",
         "jnp.mean(sums.logsumexp_squared) / jnp.maximum(counts.targets, 1)"),
        ("config.router_z * router_z", "config.load_balance * router_z"),
        ("loss + config.load_balance * load_balance", "loss + load_balance"),
    ],
    ("training/step.py", f"{STEP}an_infinite_gradient_or_loss_alone_skips_the_update"): [
        ("& jnp.isfinite(grad_norm)", "& True"),
        ("jnp.isfinite(losses.total) &", "True &"),
    ],
    ("training/step.py", f"{STEP}a_non_finite_loss_skips_the_update_and_training_recovers"): [
        ("step=state.step + 1", "step=state.step + 1 - skip"),
        ("(state.skipped_in_a_row + 1) * skip", "state.skipped_in_a_row + skip"),
        ("state.skipped + skip", "skip"),
        ("bias = _choose(finite, self._move_bias", "bias = _choose(True, self._move_bias"),
    ],
    ("training/step.py", f"{STEP}the_bias_rises_for_idle_experts_and_falls_for_busy_ones"): [
        ("jnp.sign(1 / load.shape[-1] - load)", "jnp.sign(load - 1 / load.shape[-1])"),
    ],
    ("training/step.py", f"{STEP}a_batch_is_cut_into_parts_of_rows_that_lie_apart"): [
        ("x.reshape(x.shape[0] // parts, parts", "x.reshape(parts, x.shape[0] // parts"),
    ],
    ("training/step.py", f"{STEP}microbatches_give_the_same_update[2-dropless]"): [
        ("config.losses.balance_over == \"batch\" and", "config.losses.balance_over != \"batch\" and"),
    ],
    ("training/step.py", f"{STEP}the_losses_are_those_worked_out_by_hand"): [
        ("jnp.mean(sums.entropy) /", "jnp.sum(sums.entropy) /"),
        ("jnp.max(load) * num_experts - 1", "jnp.max(load) * num_experts"),
    ],
    ("training/step.py", f"{STEP}dropped_assignments_are_counted"): [
        ("jnp.sum(sums.dropped) / assigned", "jnp.sum(sums.dropped)"),
    ],
    ("training/starting_point.py", f"{STARTS}a_run_of_an_earlier_version_is_not_gone_on_with"): [
        ("if self.own is not None and record is None:", "if False:"),
    ],
    ("training/starting_point.py", f"{STARTS}a_run_goes_on_with_its_own_data_alone"): [
        ("[\"data_fingerprint\"] != fingerprint", "[\"data_fingerprint\"] == \"\""),
    ],
    ("training/starting_point.py", f"{STARTS}parameters_of_which_nothing_is_known_are_said_to_be_so"): [
        ("dataclasses.replace(NOTHING, complete=False)", "NOTHING"),
    ],
    ("training/starting_point.py", f"{STARTS}parameters_come_with_their_tokenizer_and_what_no_shape_shows_is_said"): [
        ("!= tokenizer.model_bytes", "== b\"\""),
        ("if key.startswith(\"model.\"):", "if key.startswith(\"data.\"):"),
    ],
    ("training/starting_point.py", f"{STARTS}processes_must_agree_on_configuration_and_data"): [
        ("processes.check_same(fingerprint, \"this", "str.format(\"\", fingerprint, \"this"),
    ],
    ("training/trainer.py", f"{LOOP}metrics_are_sent_for_ahead_where_they_will_be_read"): [
        ("or step in (1, self.config.train.steps)", ""),
    ],
    ("training/trainer.py", f"{LOOP}the_run_ends_with_the_last_of_so_many_steps_that_were_not_finite"): [
        ("if in_a_row >= config.max_nonfinite_steps:", "if in_a_row > config.max_nonfinite_steps:"),
    ],
    ("training/trainer.py", f"{LOOP}steps_go_out_before_metrics_come_in_and_batches_are_placed_ahead"): [
        ("(0 if saves or evaluates else IN_FLIGHT)", "0"),
        ("len(pending) > (0 if", "len(pending) > (IN_FLIGHT if"),
    ],
    ("training/trainer.py", f"{LOOP}every_figure_of_the_log_is_worked_out_by_hand"): [
        ("self.data.tokens_seen(step),", "self.data.tokens_seen(step + 1),"),
        ("memory_in_use() | self.data.progress(step)", "memory_in_use() | self.data.progress(step - 1)"),
    ],
    ("model/expert_parallel.py", f"{EXCHANGES}capacity_drops_the_same_on_every_exchange[padded-random]"): [
        ("(plan.row_of >= plan.source.size)", "(plan.row_of > plan.source.size)"),
    ],
    ("model/expert_parallel.py", f"{EXCHANGES}dropless_drops_nothing[padded-3-random]"): [
        ("begins[row // block] + row % block, 0)", "begins[row // block], 0)"),
    ],
    ("model/expert_parallel.py", f"{EXCHANGES}dropless_drops_nothing[ragged-3-random]"): [
        ("ragged_exchange(rows, back, there, results", "ragged_exchange(rows, there, back, results"),
    ],
    ("kernels/exchange.py", f"{EXCHANGES}the_slices_are_a_permutation_of_all_rows"): [
        ("+ _exclusive(counts, axis=0)  #", "+ 0 * _exclusive(counts, axis=0)  #"),
        ("mine(first_sent).reshape(-1), counts[me])", "mine(landed).reshape(-1), counts[me])"),
    ],
    ("kernels/exchange.py", f"{EXCHANGES}dropless_drops_nothing[ragged-3-random]"): [
        ("_ragged(d_out, back, there, num_rows", "_ragged(d_out, there, back, num_rows"),
    ],
    ("kernels/exchange.py", f"{EXCHANGES}padded_arrivals_are_sorted_by_expert"): [
        ("searchsorted(ends, row, side=\"right\")", "searchsorted(ends, row, side=\"left\")"),
        ("jnp.sum(place[:, None] >= within", "jnp.sum(place[:, None] > within"),
    ],
    ("kernels/permutation.py", f"{EXCHANGES}dropless_drops_nothing[gather-3-random]"): [
        ("return _sum_choices(d_rows, row_of), None, None", "return _choice(d_rows, row_of, 0), None, None"),
        ("fill_value=0) * row_weight[:, None]", "fill_value=0)"),
        ("jnp.sum(_choice(rows, row_of, j) * d_y", "jnp.sum(_choice(rows, row_of, 0) * d_y"),
    ],
    ("data/files.py", "data/test_files.py data/test_sources.py::test_nothing_to_read_is_said"): [
        ("    if path.is_dir():\n        root", "    if False:\n        root"),
        ("    elif path.exists():", "    elif False:"),
        ("if entry.name.startswith(\".\"):", "if False:"),
        ("if identity(folder) in seen:", "if False:"),
        ("elif files.setdefault(identity(file), file) != file:", "elif False:"),
        ("if Path(entry).is_dir() and not", "if entry.is_dir(follow_symlinks=False) and not"),
        ("not parts[0].startswith(\".\")\n", "False\n"),
    ],
    ("weights/released_config.py", "weights/test_released_config.py weights/test_bad_configurations.py"): [
        ("window < context)", "window > context)"),
        ("if isinstance(window, list):", "if False:"),
        ("load_balance / config.num_experts_per_tok", "load_balance"),
        ("1e4 if \"num_experts\" not in", "1e4 if \"num_experts\" in"),
        ("if any(value != values[0] for value in values):", "if False:"),
    ],
    ("weights/released_keys.py", "weights/test_released_config.py weights/test_bad_configurations.py"): [
        ("or key in HARMLESS or", "or True or"),
        ("    \"tied_embeddings\": (False,),", "    \"tied_embeddings\": (False, True),"),
        ("    \"activation\": (\"silu\",),", "    \"activation\": (\"silu\", \"gelu\"),"),
        ("or not 0 < value < limit", "or not value < limit"),
    ],
    ("weights/destination.py", "weights/test_destinations.py"): [
        ("if directory.is_symlink() and not directory.exists():", "if False:"),
        ("target == Path.cwd() or", "False and"), ("undo.callback(remove)", "pass"),
    ],
    ("whole_files.py", "test_whole_files.py"): [
        ("_is_left(left) and", ""), ("stat.S_ISDIR(found.st_mode) and ", ""), ("os.path.samestat(path", "max(path"),
        ("            file.truncate()\n", ""), ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_UN"),
    ],
    ("evaluation/outputs.py", "evaluation/test_outputs.py"): [
        ("direct = target.exists() and not target.is_file()", "direct = False"),
        ("target = path.resolve()\n    text", "target = path\n    text"),
        ("if target.is_dir():", "if False:"), ("elif not target.parent.is_dir():", "elif False:"),
    ],
    ("training/optimizer.py", "training/test_optimizer.py"): [
        ("peak_step = max(0, warmup - 1)", "peak_step = max(0, warmup)"),
        ("length = max(1, steps - 1 - peak_step)", "length = max(1, steps - peak_step)"),
        ("config.learning_rate * config.final_learning_rate_ratio", "config.final_learning_rate_ratio"),
        ("[length - decay]", "[length]"),
        ("if warmup + decay > steps:", "if warmup + decay > steps + 1:"),
        ("if warmup >= steps:", "if warmup > steps:"),
        ("if axis != \"layers\"]) >= 2", "]) >= 2"),
        ("count = adam.count + gradients.finite", "count = adam.count + 1"),
        ("jnp.minimum(1, config.clip_norm", "jnp.maximum(1, config.clip_norm"),
        ("(1 / (1 - beta**count)", "(1 / (1 - beta**(count + 1))"),
        ("factors._replace(weight_decay=0.0)", "factors"),
    ],
    ("data/row_order.py", "data/test_pipeline.py"): [
        ("counts.append((rows * share + SHARES // 2) // SHARES)", "counts.append(rows * share // SHARES)"),
        ("+ SHARES // 2) // SHARES for step", ") // SHARES for step"),
        ("SHARES - 1)\n", "SHARES)\n"),
        ("max(1, round(", "max(0, round("),
        ("open_rows &= ~taken", "open_rows &= taken"),
        ("_network(rows // size, size", "_network(0 * (rows // size), size"),
        ("np.uint64(source * ROUNDS)", "np.uint64(0)"),
        ("values[todo] >= size", "values[todo] > size"),
    ],
    ("data/packing.py", "data/test_packing.py"): [
        ("documents.num_tokens - 1) // seq_len", "documents.num_tokens) // seq_len"),
        ("padding = places >= documents.num_tokens", "padding = places > documents.num_tokens"),
        ("positions = np.where(padding, 0, columns - begin_of)", "positions = np.where(padding, 0, columns)"),
        ("(segments[:, :-1] == segments[:, 1:]) & ~padding", "~padding"),
        ("= documents.bos_id", "= 0"),
        ("np.where(padding, 0, segments + 1)", "np.where(padding, 0, segments)"),
    ],
    ("data/record.py", "data/test_record.py data/test_splits.py"): [
        ("wanted = holdout * cache.num_tokens", "wanted = (1 - holdout) * cache.num_tokens"),
        ("np.uint64(seed & (2**64 - 1))", "np.uint64(0)"),
        ("until[chosen] = 0", "until[chosen] = lengths[chosen]"),
        ("if not holdout:", "if False:"),
        ("(of_each[1] >= FEWEST)", "(of_each[1] < FEWEST)"),
        ("np.union1d(record.trained, documents[until == lengths])", "documents[until == lengths]"),
        ("lengths * copies)[order]", "lengths)[order]"),
    ],
    ("data/splits.py", "data/test_splits.py data/test_record.py"): [
        ("np.maximum(self._until - 1, 0)", "np.maximum(self._until, 0)"),
        ("self._lengths - skipped", "self._lengths"),
        ("cache.document_bytes - self._tail_bytes", "cache.document_bytes"),
        ("and 2 * self._lengths[ours]", "and 9 * self._lengths[ours]"),
        ("fresh = self._held | (self._until == 0)", "fresh = self._held | (self._until >= 0)"),
    ],
    ("runs/manifest.py", "runs/test_checkpoint.py"): [
        ("if path.is_file() and path != directory / NAME",
         "if path.is_file() and path != directory / NAME and path.name[0] != \"_\""),
        ("if digest != expected:", "if False:"), ("if extra := there.keys() - recorded.keys():", "if False:"),
        ("if (found := there[name].stat().st_size) != size:", "if False:"),
    ],
    ("runs/disk.py", "runs/test_checkpoint.py"): [("if free < needed * 1.05:", "if free < needed * 0:")],
    ("runs/checkpoint.py", "runs/test_checkpoint.py"): [
        ("kept = set(finished[-self.config.keep :])", "kept = set(finished[: self.config.keep])"),
        ("if step % self.config.keep_every == 0}", "if step % self.config.keep_every == 1}"),
        ("for step in reversed(self.steps()):", "for step in self.steps():"),
        (".get(\"bundle\", step)) != step:", ".get(\"bundle\", step)) == -1:"),
    ],
    ("runs/checkpoint.py", "runs/test_checkpoint.py runs/test_nfs.py"): [
        ("if removed and (damage := ", "if False and (damage := "),
        ("self.warn(f\"warning: the old checkpoint", "raise OSError(f\"warning: the old checkpoint"),
    ],
    ("runs/run_dir.py", f"{DRILLS}a_file_system_without_locks_is_one_sentence"): [
        ("except OSError as error:\n            os.close(self._lock)", "except KeyError as error:\n            pass"),
    ],
    ("data/token_cache.py", f"{CACHE}that_changes_under_a_run_is_named_or_does_no_harm"): [
        ("if (now := _status(file)) != before and now[0] == before[0]:", "if False:"),
        ("!= before and now[0] == before[0]:", "!= before:"),
    ],
    ("data/token_cache.py", "fuzz/test_fuzz.py::test_what_was_found"): [("if not _agrees(index):", "if False:")],
    ("weights/torch_files.py", "fuzz/test_fuzz.py::test_what_was_found"): [
        ("class _Unpickler(pickle._Unpickler)", "class _Unpickler(pickle.Unpickler)"),
        ("or len(shape) != len(strides) or", "or"),
    ],
    ("data/pipeline.py", "data/test_pipeline.py"): [("        for check in self._checks:\n            check()", "")],
    ("data/row_order.py", "fuzz/test_properties.py"): [("for key in reversed(keys):", "for key in keys:")],
    ("model/routing.py", f"{MOE}the_selection_bias_moves_the_choice_and_not_the_weights"): [
        ("jax.nn.softmax(router_logits, axis=-1) + selection_bias", "jax.nn.softmax(router_logits, axis=-1)"),
        ("return indices, jax.nn.softmax(kept, axis=-1)", "return indices, kept"),
    ],
    ("model/routing.py", f"{EXCHANGES}what_overflows_a_buffer_is_dropped_and_counted[gather-2-1.0-random]"): [
        ("kept = jnp.where(earlier < quota", "kept = jnp.where(earlier <= quota"),
    ],
    ("model/routing.py", f"{EXCHANGES}a_device_has_room_for_what_can_come"): [
        ("worst = tokens * min(k, num_experts // devices)", "worst = tokens * k"),
    ],
    ("model/routing.py", f"{EXCHANGES}capacity_drops_the_same_on_every_exchange[gather-random]"): [
        ("(earlier < capacity), row", "(earlier <= capacity), row"),
    ],
    ("model/routing.py", f"{MOE}capacity_is_the_balanced_load_times_the_factor"): [
        ("math.ceil(factor * seq_len * k / num_experts)", "math.ceil(factor * seq_len / num_experts)"),
    ],
    ("model/moe.py", f"{EXCHANGES}capacity_drops_the_same_on_every_exchange[gather-padding]"): [
        ("jnp.where(valid[..., None], indices, config.num_experts)", "indices + 0"),
    ],
    ("model/moe.py", f"{EXCHANGES}dropless_drops_nothing[gather-3-padding]"): [
        ("(kept == config.num_experts) & (experts < config.num_experts)", "(kept == config.num_experts)"),
    ],
    ("evaluation/windows.py", "evaluation/test_windows.py evaluation/test_perplexity.py"): [
        ("math.ceil(context / 2)", "context"),
        ("if predicted >= max_tokens:", "if predicted > max_tokens:"),
        ("(np.arange(begin, end + 1) > predicted)", "(np.arange(begin, end + 1) > begin)"),
        ("begin, predicted = begin + stride, end", "begin, predicted = begin + context, end"),
        ("begin, end = end, min(end + context, len(document))", "begin, end = end, min(end + room, len(document))"),
        ("= np.arange(window.size)", "= np.arange(start, start + window.size)"),
        ("= segment\n", "= 1\n"),
        ("if window.size > room:", "if window.size >= room:"),
    ],
    ("evaluation/perplexity.py", "evaluation/test_perplexity.py"): [
        ("bad = ~(chosen <= MOST_NATS)", "bad = chosen > MOST_NATS"),
        ("np.count_nonzero(heldout.counts(index)) for index", "len(heldout.tokens(index)) for index"),
        ("np.log(counts + 1.0)", "np.log(counts + 2.0)"),
        ("math.log(counts.sum() + vocab_size)", "math.log(counts.sum() + 1)"),
        ("documents.tokens(index)[documents.counts(index)], 1)", "documents.tokens(index), 1)"),
    ],
    ("evaluation/intervals.py", "evaluation/test_intervals.py"): [
        ("[(1 - coverage) / 2, (1 + coverage) / 2]", "[1 - coverage, coverage]"),
        ("len(documents) < 2 for", "len(documents) < 1 for"),
    ],
    ("weights/names.py", "weights/test_round_trips.py::test_every_format_gives_the_same_arrays_on_every_mesh"): [
        ("attention.wq.weight\", \"layers/attention/wq\", \"(heads half pair)",
         "attention.wq.weight\", \"layers/attention/wq\", \"(heads pair half)"),
        ("d_ff) d_model\", part=1)", "d_ff) d_model\", part=0)"),
        ("_HF_EXPERT + \"w1.weight\", _HF", "_HF_EXPERT + \"w3.weight\", _HF"),
    ],
    ("weights/upcycling.py", "weights/test_upcycling.py"): [
        ("router_init_std(config) * jax.random.normal", "0 * jax.random.normal"),
        ("noise * jnp.std(wide) * jax.random", "noise * jax.random"),
        ("NOISY.index(path)], layer), expert)", "NOISY.index(path)], layer), 0)"),
    ],
    ("weights/upcycling.py", STARTS + "a_run_with_one_expert_becomes_a_mixture_that_computes_the_same"):
        [("broadcast_to(array, wanted.shape)", "zeros(wanted.shape)"), ("[axis] = 1, None", "[axis] = 1, 'expert'")],
    ("planning/estimate.py", "planning/test_search.py::test_memory_of_the_state_by_hand"): [
        ("own * (master + moment + WIDE)", "own * (master + WIDE)"),
        ("(WIDE if train.microbatches == 1 else WIDE + sums)", "WIDE"),
        ("+ 2 * vocab * d)", "+ vocab * d)"),
    ],
    ("planning/estimate.py", "planning/test_search.py::test_a_step_takes_the_longest_part_and_a_share_of_the_others"): [
        ("return max(parts) + BARE * (sum(parts) - max(parts))", "return max(parts)"),
    ],
    ("planning/network.py", "planning/test_network.py"): [
        ("(2 if ring else 1) / step", "1 / step"),
        ("worst = Seconds(max(worst.near, seconds.near)", "worst = Seconds(min(worst.near, seconds.near)"),
        ("len(places) * step == length and", "True and"),
    ],
    ("metrics.py", "test_metrics.py"): [
        ("return 6.0 * (multiplied + attention)", "return 6.0 * (multiplied + 2 * attention)"),
        ("model_flops / (num_devices * peak.value)", "model_flops / peak.value"),
        ("layer += model.num_experts_per_tok * _expert", "layer += model.num_experts * _expert"),
    ],
    ("preparation/rules.py", "preparation/test_rules.py"): [
        ("\"duplicate_lines\": \"dup_line_frac\"", "\"duplicate_paragraphs\": \"dup_line_frac\""),
        ("\"duplicate_paragraphs\": \"dup_para_frac\"", "\"duplicate_lines\": \"dup_para_frac\""),
        ("\"duplicate_line_characters\": \"dup_line", "\"duplicate_paragraphs\": \"dup_line"),
        ("\"duplicate_ngrams\": \"dup_n_grams\"", "\"top_ngrams\": \"dup_n_grams\""),
        ("\"max_mean_word_length\": \"max_avg", "\"min_mean_word_length\": \"max_avg"),
        ("\"min_alphabetic_words\": \"max_non", "\"max_bullet_lines\": \"max_non"),
        ("\"max_bullet_lines\": \"max_bullet", "\"max_ellipsis_lines\": \"max_bullet"),
        ("\"terminal_punctuation\": \"filter", "\"javascript\": \"filter"),
        ("\"javascript\": \"filter_javascript\"", "\"policy\": \"filter_javascript\""),
        ("\"min_punctuated_lines\": \"line", "\"max_short_lines\": \"line"),
        ("\"max_short_lines\": \"short", "\"min_punctuated_lines\": \"short"),
        ("\"max_lines_per_word\": \"new_line", "\"max_short_lines\": \"new_line"),
        ("(FineWebQualityFilter, {", "(C4QualityFilter, {"),
        ("if document.metadata[\"curated\"]:", "if not document.metadata[\"curated\"]:"),
    ],
    ("preparation/stages.py", "preparation/test_rules.py"): [
        ("for name in RULES:", "for name in list(RULES)[1:]:"),
        ("if config.pii.enabled:", "if True:"),
        ("if config.url_filter.enabled:", "if True:"),
    ],
    ("preparation/url_filter.py", "preparation/test_rules.py"): [
        ("config.max_soft_words + 1", "config.max_soft_words"),
        ("address.fqdn in self._own_domains", "False"),
    ],
    ("preparation/language.py", "preparation/test_rules.py"): [
        ("if probability < self._config.min_probability:", "if probability < 1 - self._config.min_probability:"),
    ],
    ("preparation/words.py", "preparation/test_words.py"): [
        ("[{UNSPACED}]|{LETTERS}", "[{UNSPACED}]+|{LETTERS}"),
    ],
    ("preparation/masking.py", "preparation/test_masking.py"): [
        ("rpartition(\"..\")[2]", "rpartition(\"...\")[2]"),
        ("(?!\\w|\\.\\d|-[A-Za-z])", "(?!\\w|-[A-Za-z])"),
        ("if NUMBERED.search(before) else", "if False else"),
        ("(?<![{ATOM}.])[{ATOM}.]++@", "[{ATOM}.]+@"),
    ],
    ("preparation/decoding.py", "preparation/test_decoding.py"): [
        ("if whole >= SURE * broken and not other:", "if whole > SURE * broken and not other:"),
        ("if whole >= broken and not other:", "if False:"),
        ("guess if guess in GUESSED else WESTERN", "guess or WESTERN"),
        ("yield found[1], \"HTTP header\"", "pass"),
        ("COMMENT.sub(b\"\", data[:HEAD])", "data[:HEAD]"),
        ("== \"content-type\" and (", "!= \"\" and ("),
        ("text.count(\"\\ufffd\") - data.count", "text.count(\"\\ufffd\") + data.count"),
        ("not label.lower().startswith(\"utf-16\")", "True"),
    ],
    ("preparation/decompression.py", "preparation/test_file_readers.py preparation/test_warc_records.py"): [
        ("raw = pending[1:]", "raw = b\"\""),
        ("and raw.strip(b\"\\0\"):", "and raw:"),
        ("if raw[0] != DICTIONARY:", "if True:"),
        ("if not begin and BINARY.search(raw[:16]):", "if False:"),
    ],
    ("preparation/warc_records.py", "preparation/test_warc_records.py preparation/test_file_readers.py"): [
        ("ends = rest.startswith(END) or", "ends ="),
        ("if length > self._limit:", "if False:"),
        ("rb\"WARC/[01]", "rb\"\\nWARC/[01]"),
    ],
    ("preparation/warc_pages.py", "preparation/test_warc_pages.py"): [
        ("partition(\";\")[0].strip().lower()", "strip()"),
        ("in reversed(coding.lower()", "in (coding.lower()"),
        ("data = found or data", "data = found"),
        ("if len(content) > limit:", "if False:"),
        ("transfer.strip().lower() == \"chunked\"", "False"),
    ],
    ("preparation/file_readers.py", "preparation/test_file_readers.py"): [
        ("if cut or len(line) > limit:", "if cut or len(line) >= limit:"),
        ("if \"\\0\" in text:", "if False:"),
        ("\"surrogatepass\").decode(\"utf-16-le\", \"replace\")", "\"replace\").decode(\"utf-16-le\", \"replace\")"),
        ("if not number and piece and", "if not number and not piece and"),
    ],
    ("preparation/report_numbers.py", "preparation/test_config.py"): [
        ("** (1 / temperature)", "** temperature"),
        ("if count}", "if count > 50}"),
    ],
}  # fmt: skip

MUTANTS = [Mutant(file, old, new, tests) for (file, tests), changes in TABLE.items() for old, new in changes]
