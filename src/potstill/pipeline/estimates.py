"""What a step of each kind takes at most (rows, tokens, dollars, memory, disk, time), and what it refuses."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from potstill.cache import CacheSettings
from potstill.core.errors import PotstillError
from potstill.core.records import Record
from potstill.core.settings import DataRef, meaning
from potstill.core.store import MANIFEST_FILE, Artifact
from potstill.data.sources import read_beforehand
from potstill.evaluate.harness import check_harness
from potstill.evaluate.rouge import check_rouge
from potstill.generate import GenerateSettings, check_budget
from potstill.models import (
    TransformersModel,
    stored_quantization,
)
from potstill.pipeline.graph import Node
from potstill.pipeline.memory import activation_bytes, decoding_bytes, loss_bytes, scoring_bytes
from potstill.pipeline.planner import (
    GB,
    LETTERS_A_TOKEN,
    PlannedStep,
    Planner,
    is_adapter,
    kept_ids,
    kept_share,
    model_names,
    trains_adapter,
    upstream_tokens,
)
from potstill.pipeline.times import evaluation_tokens
from potstill.retrieval.dense import check_qdrant
from potstill.student.sizes import planned_parameters
from potstill.teachers import OpenAIModel, check_gives_logprobs
from potstill.teachers.continuation import check_continues
from potstill.teachers.solver import SolverModel
from potstill.teachers.transformers import local_batch
from potstill.train.settings import default_max_tokens

__all__ = ["ESTIMATES", "TRACE_TOKEN_BYTES", "cache_bytes_a_token"]

# Bytes a parameter: fp32 weight, gradient and AdamW's two moments; a weight on disk.
_TRAINED_BYTES, _STORED_BYTES = 16, 4
TRACE_TOKEN_BYTES = 16
_NEAR_DUPLICATE_BYTES = 3_300  # a row (select.duplicates)
_ADAPTER_BYTES = 0.16  # an adapter has about a hundredth of the weights, which are trained
# Bytes of a token's cached logits: a kept or drawn id, a temperature's sums, ids and key of the row itself.
_TOP_K_ID_BYTES, _SAMPLED_ID_BYTES, _TEMPERATURE_BYTES, _ROW_BYTES = 1.85, 1.9, 4.0, 4.0
_MESSAGE_TOKENS = 8  # that a chat template puts round a message


def _plan_generate(planner: Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    if settings.continue_ is not None and (model := planner.graph.models.get(settings.model.target)):
        try:
            check_continues(model, f"model {settings.model}")
        except PotstillError as error:
            planner.problem(f"step {node.name}: {error}")
    # A limit bounds what cannot be counted beforehand.
    bounds = [
        planner.rows_of(node, settings.data),
        settings.limit,
        getattr(settings.data, "limit", None),
    ]
    if known := [bound for bound in bounds if bound is not None]:
        planned.rows = min(known) * settings.samples
        if not isinstance(
            planner.graph.models.get(settings.model.target), SolverModel
        ):  # a function writes as much as it likes, and at once
            planned.tokens = planned.rows * settings.max_new_tokens
            planned.disk_gb = planned.tokens * TRACE_TOKEN_BYTES / GB
    rows = settings.concurrency or local_batch(planner.device(node))
    tokens = math.ceil(planner.prompt_tokens(node, settings.data)) + settings.max_new_tokens
    if (needed := decoding_bytes(planner, node, settings.model, rows, tokens)) is not None:
        planned.memory_gb = needed / GB
    _plan_cost(planner, node, planned)


def _plan_cost(planner: Planner, node: Node, planned: PlannedStep) -> None:
    """About the most that a generate step can cost, with its prompts where they can be read beforehand."""
    settings: Any = node.settings
    model = planner.graph.models.get(settings.model.target)
    try:
        check_budget(settings, model)
        prompts = planner.prompts_of(node, settings.data)
    except PotstillError as error:
        planner.problem(f"step {node.name}: {error}")
        return
    if not isinstance(model, OpenAIModel) or model.price is None or planned.rows is None:
        return
    prompt_tokens = planned.rows * planner.prompt_tokens(node, settings.data)
    if not prompts:
        planner.note(f"step {node.name}: its cost is without that of the prompts")
    planned.cost_usd = model.price.cost(prompt_tokens, planned.tokens or 0)
    if settings.max_cost is not None:
        planned.cost_usd = min(planned.cost_usd, settings.max_cost)


def _plan_select(planner: Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    read = planner.rows_of(node, settings.data)
    planned.rows = None if read is None else math.ceil(read * kept_share(planner, node))
    upstream = upstream_tokens(planner, node)
    if upstream is not None:
        planned.disk_gb = upstream * TRACE_TOKEN_BYTES / GB
        # A teacher that fills in what is missing may have to score everything.
        prompts = math.ceil((read or 0) * planner.prompt_tokens(node, settings.data))
        planned.tokens = (upstream + prompts) * len(settings.models)
        served = [planner.graph.models.get(one.target) for one in settings.models.values()]
        if prices := [price for one in served if (price := getattr(one, "price", None))]:
            # Of each row the server generates one token.
            planned.cost_usd = sum(price.cost(upstream, read or 0) for price in prices)
            planner.note(f"step {node.name}: its cost is without that of the prompts")
    needed = [
        found for reference in settings.models.values() if (found := scoring_bytes(planner, node, reference))
    ]
    if needed:
        planned.memory_gb = max(needed) / GB  # one after the other
    if read and settings.filters is not None and settings.filters.near_duplicates is not None:
        index_gb = read * _NEAR_DUPLICATE_BYTES / GB
        planned.memory_gb = max(planned.memory_gb or 0.0, index_gb)  # gone before a model is loaded
        planner.note(
            f"step {node.name}: near_duplicates keeps hashes of each row in memory, about {index_gb:.1f} GB; "
            "every other filter's memory stays as it is however many rows there are"
        )
    _check_scorers(planner, node)
    if settings.rule == "none" or settings.teacher is not None:
        return
    for maker in planner.writers(node):
        if getattr(maker.settings, "logprobs", None) is None:
            planner.problem(
                f"step {node.name}: the traces of {maker.name} have no log-probabilities; set "
                f"`{maker.name}.logprobs=1`, or name a `teacher` in {node.name}"
            )
    if planner.reads_files(settings.data):
        planner.note(
            f"step {node.name}: whether all its rows have log-probabilities shows when they are read"
        )


def _check_scorers(planner: Planner, node: Node) -> None:
    """A problem for each model of a select step that cannot score given text."""
    settings: Any = node.settings
    for role, reference in settings.models.items():
        if (model := planner.graph.models.get(reference.target)) is not None:
            try:
                check_gives_logprobs(model, f"the {role} {reference}")
            except PotstillError as error:
                planner.problem(f"step {node.name}: {error}")


def _plan_cache(planner: Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    if planner.reads_files(settings.data):
        kept = _count_read(planner, node, planned)
    else:
        planned.rows = planner.rows_of(node, settings.data)
        kept = planned.tokens = upstream_tokens(planner, node)
    if kept:
        planned.disk_gb = kept * cache_bytes_a_token(settings) / GB
    _check_mask(planner, node)
    if settings.from_traces:
        _check_alternatives(planner, node)
    elif needed := scoring_bytes(planner, node, settings.model):
        planned.memory_gb = needed / GB


def _count_read(planner: Planner, node: Node, planned: PlannedStep) -> int | None:
    """Note a cache's rows and tokens where they come from outside the recipe, as far as they can be read.

    Returns about how many of the tokens are supervised, and kept.
    """
    settings: Any = node.settings
    rows = tokens = kept = 0
    try:
        if (records := read_beforehand(settings.data, planner.seed)) is None:
            return _count_unread(planner, node, planned)
        for record in records:
            whole, supervised = _tokens_of(record, settings.max_length)
            rows, tokens, kept = rows + 1, tokens + whole, kept + supervised
    except PotstillError as error:
        planner.problem(f"step {node.name}: {error}")
        return None
    planned.rows, planned.tokens = rows, tokens
    planner.note(
        f"step {node.name}: its tokens are an estimate, {LETTERS_A_TOKEN:g} letters each; other scripts, "
        "code and figures may take more"
    )
    return kept


def _count_unread(planner: Planner, node: Node, planned: PlannedStep) -> int | None:
    """The same of rows that are not read before a run: those of the hub, of an artifact, of a mixture."""
    settings: Any = node.settings
    data = settings.data
    planned.rows = planner.rows_of(node, data)
    if isinstance(data, DataRef) and (Path(data) / MANIFEST_FILE).is_file():
        found = Artifact.open(Path(data))
        planned.tokens = found.manifest.tokens if found.kind == GenerateSettings.kind else None
    elif planned.rows and settings.max_length:
        planned.tokens = planned.rows * settings.max_length
        planner.note(
            f"step {node.name}: more tokens than these where texts are longer than max_length, which come in "
            "windows of it"
        )
    if planned.tokens is None:
        planner.note(f"step {node.name}: its tokens and its disk show once its rows are read")
    return planned.tokens


def _tokens_of(record: Record, max_length: int | None) -> tuple[int, int]:
    """About how many tokens a row that is to be scored has, and how many of them are supervised."""
    written = math.ceil(len(record.response or "") / LETTERS_A_TOKEN) + 1
    if not record.messages:  # each window of a long text begins with the last token of the one before
        return written + (written // (max_length - 1) if max_length else 0), written
    asked = sum(len(one["content"]) for one in record.messages) / LETTERS_A_TOKEN
    whole = written + math.ceil(asked) + _MESSAGE_TOKENS * (len(record.messages) + 1)
    if max_length is not None and whole > max_length:  # it may be left out
        return max_length, min(written, max_length)
    return whole, written


def _check_alternatives(planner: Planner, node: Node) -> None:
    """A problem for each generate step whose traces will not hold what a cache is to be made of."""
    settings: Any = node.settings
    for maker in planner.writers(node):
        kept = getattr(maker.settings, "logprobs", None) or 0
        if kept < max(2, settings.top_k):
            planner.problem(
                f"step {node.name}: top_k is {settings.top_k}, and the traces of {maker.name} hold "
                f"{kept if kept > 1 else 'no'} alternatives to each token; set `{maker.name}.logprobs` to at "
                "least as many"
            )


def cache_bytes_a_token(settings: CacheSettings) -> float:
    """About what a token takes, from benchmarks/logit_cache.py; other traces differ by some percent."""
    if settings.codec == "sampled":
        # The distinct ids among n draws grow with about the square root of n.
        return float(_SAMPLED_ID_BYTES * settings.draws**0.5 + _ROW_BYTES)
    ids = settings.top_k * _TOP_K_ID_BYTES
    return float(ids + len(settings.temperatures) * _TEMPERATURE_BYTES + _ROW_BYTES)


def _plan_init(planner: Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    planned.rows = planner.rows_of(node, settings.data)
    planned.parameters = planner.of_model(
        node, settings.model, lambda model: planned_parameters(settings, model)
    )
    if parameters := planner.parameters(node, settings.model):
        # The model and its student, or two students of a search; a new model may be larger than its lender.
        student = (planned.parameters if settings.method == "from_config" else None) or parameters
        planned.memory_gb = (parameters + student) * _STORED_BYTES / GB
        planned.disk_gb = student * _STORED_BYTES / GB
    if planned.parameters:
        most = "at most " if settings.target_params or settings.target_ratio else ""
        planner.note(f"step {node.name}: a student of {most}{planned.parameters:,} parameters")


def _plan_train(planner: Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    planned.rows = planner.rows_of(node, settings.data)
    epochs = settings.epochs
    if settings.max_steps and planned.rows:
        epochs = settings.max_steps * settings.batch / planned.rows
    if settings.tokens is not None:
        planned.tokens = settings.tokens
    elif tokens := upstream_tokens(planner, node):
        planned.tokens = int(tokens * epochs)
    if settings.top_k is not None:
        _check_top_k(planner, node)
    _check_temperature(planner, node)
    if settings.feature is not None:
        _check_feature(planner, node)
    adapter = trains_adapter(planner, node)
    _check_student(planner, node, adapter=adapter)
    if parameters := planner.parameters(node, settings.student):
        frozen = planner.frozen_bytes(node, settings.student, settings.device) if adapter else None
        weights = frozen + parameters * _ADAPTER_BYTES if frozen else parameters * _TRAINED_BYTES
        if settings.base_kl and not adapter:
            weights += parameters * _STORED_BYTES
        if settings.teacher is not None:
            weights += planner.frozen_bytes(node, settings.teacher, settings.device) or 0.0
        planned.weights_gb = weights / GB
        device = planner.device(node)
        max_tokens = settings.max_tokens or default_max_tokens(device.type)
        planned.memory_gb = planned.weights_gb + activation_bytes(settings, parameters, max_tokens) / GB
        planned.memory_gb += loss_bytes(planner, node, device) / GB
        # A checkpoint holds the weights and both moments while the next one is written.
        planned.disk_gb = parameters * (0.1 if adapter else 2 * 12 + _STORED_BYTES) / GB
        if settings.keep_epochs is not None:
            kept = math.floor(epochs) if settings.keep_epochs == "all" else settings.keep_epochs
            planned.disk_gb += kept * parameters * _STORED_BYTES * (0.01 if adapter else 1) / GB


def _check_student(planner: Planner, node: Node, *, adapter: bool) -> None:
    """Problems where the student cannot be trained as the step asks."""
    settings: Any = node.settings
    if settings.lora is not None and is_adapter(planner, node, settings.student):
        planner.problem(
            f"step {node.name}: {settings.student} is an adapter, and lora asks for another one on top of "
            "it; leave lora out to train the adapter on"
        )
    quantised = planner.of_model(
        node, settings.student, lambda model: model.quantize or stored_quantization(model)
    )
    if quantised and not adapter:
        planner.problem(
            f"step {node.name}: {settings.student} is quantised to {quantised}, and quantised weights cannot "
            "be trained; add lora"
        )
    if settings.mask_prefix and kept_ids(planner, node):
        planner.problem(
            f"step {node.name}: {settings.data} holds a teacher's logits, which have their own mask; set "
            "mask_prefix in the cache step"
        )
    else:
        _check_mask(planner, node)


def _check_mask(planner: Planner, node: Node) -> None:
    """A problem where a step is to leave out beginnings that no other model will have written."""
    settings: Any = node.settings
    if not settings.mask_prefix or planner.reads_files(settings.data):
        return
    writers = planner.writers(node)
    if writers and all(getattr(one.settings, "continue_", None) is None for one in writers):
        names = ", ".join(one.name for one in writers)
        planner.problem(
            f"step {node.name}: mask_prefix leaves nothing out, as {names} continues no response; leave it "
            "out, or set continue: there"
        )


def _check_top_k(planner: Planner, node: Node) -> None:
    """A problem where a train step asks for more ids than its data keep, or for any where they were drawn."""
    settings: Any = node.settings
    asked = f"step {node.name}: top_k is {settings.top_k}, but"
    kept = kept_ids(planner, node)
    if not kept:
        planner.problem(f"{asked} its data are no cached logits")
    for name, k in kept.items():
        if k is None:
            planner.problem(f"{asked} {name} keeps drawn ids, not the most probable ones")
        elif k < settings.top_k:
            planner.problem(f"{asked} {name} keeps {k}")


def _check_temperature(planner: Planner, node: Node) -> None:
    """A problem where a train step asks for a temperature that its data, cached logits, are not kept for."""
    settings: Any = node.settings
    data = settings.data
    if not isinstance(data, DataRef):
        return
    if data.is_path:
        found = Artifact.open(Path(data)) if (Path(data) / MANIFEST_FILE).is_file() else None
        kept = {str(data): found.manifest.extra.get("temperatures")} if found is not None else {}
    else:
        makers: dict[str, Any] = {one.name: one.settings for one in planner.graph.steps_named(data, node)}
        kept = {name: getattr(maker, "temperatures", None) for name, maker in makers.items()}
    for name, temperatures in kept.items():
        if temperatures and settings.temperature not in temperatures:
            stated = ", ".join(f"{one:g}" for one in temperatures)
            planner.problem(
                f"step {node.name}: temperature is {settings.temperature:g}, and {name} keeps {stated}: "
                "cache it with this one, or train at one of those"
            )


def _check_feature(planner: Planner, node: Node) -> None:
    """A problem where a train step compares inner states, and no teacher in memory has any."""
    settings: Any = node.settings
    if caches := kept_ids(planner, node):
        planner.problem(
            f"step {node.name}: feature compares inner states with the teacher's, and {', '.join(caches)} "
            "holds the teacher's answers alone; name the traces as data, and the model as teacher"
        )
    elif settings.teacher is None:
        planner.problem(
            f"step {node.name}: feature compares inner states with the teacher's, and there is no teacher; "
            f"set `{node.name}.teacher` to a model of the student's tokenizer"
        )


def _plan_merge(planner: Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    models = settings.named_models or [settings.model]
    for reference in models:
        if not is_adapter(planner, node, reference):
            planner.problem(f"step {node.name}: {reference} is no adapter: there is nothing to merge")
    if settings.models is not None:
        try:
            settings.weights_of([name for one in models for name in model_names(planner, node, one)])
        except PotstillError as error:
            planner.problem(f"step {node.name}: {error}")
    if settings.data is not None:
        planned.rows = planner.rows_of(node, settings.data)
        planned.rows = None if planned.rows is None else min(planned.rows, settings.limit)
    if parameters := planner.parameters(node, models[0]):
        # Full weights to merge, and what was saved to compare them with.
        planned.memory_gb = 2 * parameters * _STORED_BYTES / GB
        planned.disk_gb = parameters * _STORED_BYTES / GB


def _plan_retrieve(planner: Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    planned.rows = planner.rows_of(node, settings.data)
    planner.rows_of(node, settings.corpus)  # for what is wrong with it
    try:
        meaning(settings)  # likewise of the encoders
        if settings.method != "bm25":
            check_qdrant()
    except PotstillError as error:
        planner.problem(f"step {node.name}: {error}")
    upstream = upstream_tokens(planner, node)
    if upstream is not None and planned.rows is not None:
        planned.tokens = upstream + planned.rows * settings.document_tokens


def _plan_evaluate(planner: Planner, node: Node, planned: PlannedStep) -> None:
    settings: Any = node.settings
    for wanted, check in ((settings.lm_eval is not None, check_harness), (settings.rouge, check_rouge)):
        try:
            if wanted:
                check()
        except PotstillError as error:
            planner.problem(f"step {node.name}: {error}")
    names = list(settings.roles.values())
    if needed := _evaluation_bytes(planner, node):
        planned.memory_gb = needed / GB
    if (each := evaluation_tokens(planner, node)) is not None:
        planned.tokens = sum(each) * len(names) or None
    compared = None if settings.teacher is None else planner.graph.models.get(settings.teacher.target)
    if compared is not None and not isinstance(compared, TransformersModel):
        planner.problem(
            f"step {node.name}: the teacher {settings.teacher} is of another engine, and KL needs whole "
            "distributions; name the same weights by a path, or leave teacher out"
        )
    answers, tokens = [], 0
    for task in settings.all_tasks.values():
        decoding, limit = settings.decoding(task), task.limit or settings.limit
        rows = planner.rows_of(node, task.data)
        answers.append(None if rows is None else min(rows, limit or rows) * decoding.samples)
        tokens += (answers[-1] or 0) * decoding.max_new_tokens * task.generates
    if answers and None not in answers:
        planned.rows = sum(one or 0 for one in answers) * len(names)
        served = [planner.graph.models.get(one.target) for one in names]
        prices = [price for one in served if (price := getattr(one, "price", None))]
        if prices:
            planned.cost_usd = sum(price.cost(0, tokens) for price in prices)
            planner.note(f"step {node.name}: its cost is without that of the prompts")


def _evaluation_bytes(planner: Planner, node: Node) -> float | None:
    """What the largest model takes that scores and decodes, and the teacher beside it: models take turns."""
    settings: Any = node.settings
    names = list(settings.roles.values())
    decoded = [
        (task.data, settings.decoding(task).max_new_tokens)
        for task in settings.all_tasks.values()
        if task.generates
    ]
    if settings.data is not None and settings.samples_shown:
        decoded.append((settings.data, settings.decoding().max_new_tokens))
    longest = max((planner.prompt_tokens(node, data) + written for data, written in decoded), default=0)
    needed = [scoring_bytes(planner, node, one) for one in names]
    if longest:
        needed += [decoding_bytes(planner, node, one, settings.batch, math.ceil(longest)) for one in names]
    known = [one for one in needed if one]
    if not known:
        return None
    teacher = settings.teacher and planner.frozen_bytes(node, settings.teacher, settings.device)
    return max(known) + (teacher or 0.0)


ESTIMATES: dict[str, Callable[[Planner, Node, PlannedStep], None]] = {
    "generate": _plan_generate,
    "select": _plan_select,
    "cache": _plan_cache,
    "init": _plan_init,
    "train": _plan_train,
    "merge": _plan_merge,
    "retrieve": _plan_retrieve,
    "evaluate": _plan_evaluate,
}
