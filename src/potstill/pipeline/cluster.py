"""What the steps of a plan would take on a cluster: FLOPs, tokens a second, time, network, price."""

from dataclasses import dataclass
from typing import Any

from potstill.core.settings import ModelRef
from potstill.pipeline.graph import Node
from potstill.pipeline.planner import GB, PlannedStep, Planner, named_parameters, trains_adapter
from potstill.scale.devices import Cluster
from potstill.scale.roofline import generation, scoring_seconds, train_flops, training
from potstill.teachers import OpenAIModel

__all__ = ["ClusterStep", "on_cluster"]

_PROMPT_TOKENS = 256  # where no prompt can be read beforehand


@dataclass
class ClusterStep:
    """A step on a cluster: on how many GPUs and how, with what speed, and what it costs.

    `network_gb` is what a GPU sends in an optimiser step.
    """

    name: str
    kind: str
    how: str
    gpus: int
    flops: float
    tokens_per_s: float
    seconds: float
    network_gb: float = 0.0
    cost_usd: float | None = None


def on_cluster(planner: Planner, cluster: Cluster) -> list[ClusterStep]:
    """The steps to make whose tokens and models are known; of the others a note says why they are missing."""
    found = []
    makers = {"generate": _generate, "cache": _score, "select": _score, "train": _train}
    for name, planned in planner.steps.items():
        if planned.status != "to make" or planned.kind not in makers:
            continue
        step = makers[planned.kind](planner, planner.graph.nodes[name], planned, cluster)
        if isinstance(step, str):
            planner.note(f"step {name}: no figures for {cluster}: {step}")
        elif step is not None:
            if cluster.usd_per_gpu_hour is not None:
                step.cost_usd = step.seconds / 3600 * step.gpus * cluster.usd_per_gpu_hour
            found.append(step)
    return found


def _generate(
    planner: Planner, node: Node, planned: PlannedStep, cluster: Cluster
) -> ClusterStep | str | None:
    settings: Any = node.settings
    model = planner.graph.models.get(settings.model.target)
    if isinstance(model, OpenAIModel) and model.price is not None:
        return "it is bought by the token"
    if not planned.tokens:
        return "nobody knows how many tokens it writes; set a limit"
    if (parameters := _parameters(planner, node, settings.model)) is None:
        return f"the size of {settings.model} is not known"
    prompt = planner.prompt_tokens(node, settings.data) or _PROMPT_TOKENS
    rows, response = planned.rows or 1, settings.max_new_tokens
    written = generation(cluster, parameters, prompt_tokens=prompt, response_tokens=response, rows=rows)
    if written is None:
        planner.problem(
            f"step {node.name}: {settings.model} does not fit into one node of {cluster}; take GPUs with "
            "more memory, or more of them a node"
        )
        return None
    return ClusterStep(
        node.name,
        node.kind,
        f"{written.replicas:,} replicas, {written.at_once} rows at once each",
        written.replicas * written.gpus_per_replica,
        train_flops(parameters, rows * (prompt + response), prompt + response, passes=1),
        written.tokens_per_s,
        planned.tokens / written.tokens_per_s,
    )


def _score(planner: Planner, node: Node, planned: PlannedStep, cluster: Cluster) -> ClusterStep | str | None:
    settings: Any = node.settings
    references = settings.models.values() if planned.kind == "select" else [settings.model]
    if not references or getattr(settings, "from_traces", False):
        return None
    served = [planner.graph.models.get(one.target) for one in references]
    if any(isinstance(model, OpenAIModel) and model.price is not None for model in served):
        return "it is bought by the token"
    if not planned.tokens:
        return "nobody knows how many tokens it reads"
    tokens = planned.tokens / len(references)
    length = tokens / planned.rows if planned.rows else 0.0
    gpus, seconds, flops = min(cluster.gpus, planned.rows or cluster.gpus), 0.0, 0.0
    for reference in references:
        if (parameters := _parameters(planner, node, reference)) is None:
            return f"the size of {reference} is not known"
        if parameters * cluster.device.weight_bytes > cluster.device.memory_bytes * cluster.gpus_per_node:
            planner.problem(f"step {node.name}: {reference} does not fit into one node of {cluster}")
            return None
        seconds += scoring_seconds(cluster.device, parameters, tokens, length) / gpus
        flops += train_flops(parameters, tokens, length, passes=1)
    how = f"one pass of {len(references):,} models" if len(references) > 1 else "one pass"
    return ClusterStep(node.name, node.kind, how, gpus, flops, planned.tokens / seconds, seconds)


def _train(planner: Planner, node: Node, planned: PlannedStep, cluster: Cluster) -> ClusterStep | str | None:
    settings: Any = node.settings
    if not planned.tokens or not planned.rows:
        return "nobody knows how many tokens it trains on"
    if (parameters := _parameters(planner, node, settings.student)) is None:
        return f"the size of {settings.student} is not known"
    adapter = trains_adapter(planner, node)
    length = _upstream_length(planner, node) or planned.tokens / planned.rows
    found = training(
        cluster,
        parameters,
        batch=settings.batch,
        length=length,
        adapter=adapter,
        checkpointing=settings.activation_checkpointing,
    )
    if found is None:
        planner.problem(
            f"step {node.name}: weights and their moments do not fit into {cluster}, of whose GPUs a batch "
            f"of {settings.batch} gives work to {min(cluster.gpus, settings.batch)}; take more, or add lora"
        )
        return None
    if found.gpus < cluster.gpus:
        planner.note(
            f"step {node.name}: a batch of {settings.batch} rows leaves {cluster.gpus - found.gpus:,} of "
            f"{cluster.gpus:,} GPUs without work"
        )
    passes = 3 - adapter + settings.activation_checkpointing
    return ClusterStep(
        node.name,
        node.kind,
        f"{found.strategy}{', waits for the network' if found.waits else ''}",
        found.gpus,
        train_flops(parameters, planned.tokens, length, passes=passes),
        found.tokens_per_s,
        planned.tokens / found.tokens_per_s,
        found.network_bytes / GB,
    )


def _parameters(planner: Planner, node: Node, reference: ModelRef) -> int | None:
    if (found := planner.parameters(node, reference)) is not None:
        return found
    # A model of another engine: by the name that its server or its file has.
    model = planner.graph.models.get(reference.target)
    return named_parameters(str(getattr(model, "model", None) or getattr(model, "path", "")))


def _upstream_length(planner: Planner, node: Node) -> float | None:
    """Tokens of a row that a step reads, as far as the steps that made it say."""
    settings: Any = node.settings
    made = [planner.steps[maker.name] for maker in planner.makers(node, settings.data)]
    rows, tokens = (sum(getattr(one, figure) or 0 for one in made) for figure in ("rows", "tokens"))
    return tokens / rows if rows and tokens else None
