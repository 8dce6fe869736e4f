"""What a plan says of clusters agrees with what others have measured on them."""

import pytest

from potstill.core.errors import RecipeError
from potstill.scale import cluster_of
from potstill.scale.devices import DEVICES
from potstill.scale.roofline import generation, scoring_seconds, train_flops, training

# Published figures, with where they stand; docs/scaling.md says more of them. Tokens a second and GPU.
TRAININGS = {
    # torchtitan, docs/performance.md, rows of 8,192 and 4,096 tokens on 64 A100 80 GB.
    "Llama 3 8B on A100": (8.03e9, "8xA100", 8, {"batch": 64, "length": 8192}, 2904),
    "Llama 3 70B on A100": (70.6e9, "8xA100", 8, {"batch": 64, "length": 8192, "checkpointing": True}, 331),
    "Llama 2 13B on A100": (13.0e9, "8xA100", 8, {"batch": 128, "length": 4096}, 1914),
    # torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, with and without torch.compile.
    "Llama 3 8B on 8 H100": (8.03e9, "8xH100", 1, {"batch": 16, "length": 8192}, 6667),
    "Llama 3 8B on 128 H100": (8.03e9, "8xH100", 16, {"batch": 256, "length": 8192}, 6514),
    "Llama 3 8B on 8 H100, eager": (8.03e9, "8xH100", 1, {"batch": 16, "length": 8192}, 5762),
}
# Tokens a second that are written, prompt and response tokens, rows at once, GPUs a replica.
WRITINGS = {
    # vLLM 0.23 on one request (johnmusgrave.com, vllm-throughput-latency-sweep-on).
    "Llama 3.1 8B on A100": (8.03e9, "1xA100-40GB", 1024, 128, 1, 1, 75.0),
    # vLLM's own latency benchmark (buildkite.com/vllm/performance-benchmark/builds/9515).
    "Llama 3.1 8B on H200": (8.03e9, "1xH200", 32, 128, 8, 1, 8 * 128 / 0.8334),
    "Llama 3 70B on 4 H200": (70.6e9, "4xH200", 32, 128, 8, 4, 8 * 128 / 2.0775),
    # lmdeploy 0.2, docs/en/benchmark/a100_fp16.md.
    "Llama 2 70B on 4 A100": (69.0e9, "4xA100", 247, 233, 256, 4, 1682.7),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_trainings_speed_is_about_the_published_one(name: str) -> None:
    parameters, gpus, nodes, settings, published = TRAININGS[name]
    found = training(cluster_of(gpus, nodes), parameters, **settings)
    assert found is not None
    assert found.strategy == "fsdp2"
    assert 0.7 <= found.tokens_per_s / found.gpus / published <= 1.4


@pytest.mark.parametrize("name", WRITINGS)
def test_a_servers_speed_is_about_the_published_one(name: str) -> None:
    parameters, gpus, prompt, response, rows, replica, published = WRITINGS[name]
    found = generation(
        cluster_of(gpus),
        parameters,
        prompt_tokens=prompt,
        response_tokens=response,
        rows=rows,
        gpus_per_replica=replica,
    )
    assert found is not None
    assert found.gpus_per_replica == replica
    assert found.at_once == rows
    assert 0.7 <= found.tokens_per_s / published <= 1.4


def test_a_replica_has_as_many_gpus_as_write_the_most() -> None:
    cluster, tokens = cluster_of("8xH100"), {"prompt_tokens": 256, "response_tokens": 1024}
    stated = [generation(cluster, 32e9, gpus_per_replica=gpus, **tokens) for gpus in (1, 2, 4, 8)]
    speeds = [one.tokens_per_s for one in stated if one is not None]
    assert len(speeds) == 4, "64 GB of weights fit into each: with little room for rows into one GPU"
    found = generation(cluster, 32e9, **tokens)
    assert found is not None
    assert found.tokens_per_s == max(speeds) > speeds[0]
    # Small models have room at once, and lose nothing to waiting for one another.
    small = generation(cluster, 1e9, **tokens)
    assert small is not None
    assert (small.replicas, small.gpus_per_replica) == (8, 1)


def test_a_gpu_that_nothing_is_known_of_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(RecipeError, match="nothing is known of a GPU called 'V100'") as raised:
        cluster_of("8xV100")
    assert all(name in str(raised.value) for name in DEVICES)


@pytest.mark.parametrize("stated", ["", "0xH100", "8x", "eight H100", "8xH100,8xA100", "-1xH100"])
def test_what_is_no_cluster_is_refused(stated: str) -> None:
    with pytest.raises(RecipeError, match="--gpus"):
        cluster_of(stated)
    with pytest.raises(RecipeError, match="at least one node"):
        cluster_of("8xH100", 0)


@pytest.mark.parametrize("stated", ["8xH100", "8 x h100", "8XH100", "8×H100"])
def test_a_cluster_is_read_in_the_ways_that_it_is_written(stated: str) -> None:
    found = cluster_of(stated, 2)
    assert (found.device.name, found.gpus_per_node, found.gpus) == ("H100", 8, 16)
    assert cluster_of("h100").gpus == 1


def test_a_model_that_fits_into_no_node_or_no_cluster_has_no_figures() -> None:
    tokens = {"prompt_tokens": 100, "response_tokens": 100}
    assert generation(cluster_of("1xA100"), 70e9, **tokens) is None
    assert generation(cluster_of("8xA100"), 70e9, gpus_per_replica=1, **tokens) is None
    found = generation(cluster_of("8xA100"), 70e9, **tokens)
    assert found is not None
    assert found.replicas * found.gpus_per_replica == 8
    assert training(cluster_of("8xA100"), 70e9, batch=64, length=1024) is None
    assert training(cluster_of("8xA100", 8), 70e9, batch=8, length=1024) is None, "a batch of 8 is 8 GPUs"
    assert training(cluster_of("8xA100"), 70e9, batch=64, length=1024, adapter=True) is not None


def test_rows_and_not_gpus_bound_how_many_have_work() -> None:
    many, few = (training(cluster_of("8xH100", 16), 1e9, batch=batch, length=512) for batch in (128, 8))
    assert many is not None
    assert few is not None
    assert (many.gpus, few.gpus) == (128, 8)
    assert few.network_bytes == many.network_bytes == 2 * 4 * 1e9  # fp32 gradients, there and back


def test_short_steps_wait_for_the_network_and_long_ones_do_not() -> None:
    cluster = cluster_of("8xH100", 4)
    short, long = (training(cluster, 8e9, batch=32, length=length) for length in (64, 8192))
    assert short is not None
    assert long is not None
    assert short.waits
    assert not long.waits
    assert short.tokens_per_s < long.tokens_per_s
    # Gathered for two passes and handed on once, two bytes a weight.
    assert short.network_bytes == 3 * 2 * 8e9


def test_flops_are_those_of_six_a_weight_and_token_and_of_attention() -> None:
    assert train_flops(1e9, 1000) == 6e12
    assert train_flops(1e9, 1000, passes=2) == 4e12
    # Llama 3 8B: 32 blocks of 4,096; a model of its size is taken for one of 51 of 3,600.
    of_attention = train_flops(8.03e9, 1, 8192) - train_flops(8.03e9, 1)
    assert of_attention == pytest.approx(6 * 32 * 4096 * 8192, rel=0.45)
    one, twice = (scoring_seconds(DEVICES["H100"], 1e9, tokens) for tokens in (1e6, 2e6))
    assert twice == 2 * one
