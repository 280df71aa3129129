"""The example of Ray Serve answers as `generate` does, from a replica of its own."""

import importlib.util

import httpx
import pytest
from testbed import served
from testbed.documents import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install 'ray[serve]'"),
]


def test_replicas_answer_with_the_experts_of_a_library(tiny_llama_dir, tmp_path, monkeypatch) -> None:
    import ray
    from ray import serve

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    library = served.make_library(tiny_llama_dir, tmp_path / "library")
    spec = importlib.util.spec_from_file_location("ray_serve", ROOT / "deploy/ray_serve.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    ray.init(num_cpus=4, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        serve.start(http_options={"port": 8473})
        serve.run(example.app({"library": str(library), "replicas": "2"}))
        with httpx.Client(base_url="http://127.0.0.1:8473", timeout=60) as client:
            body = {"prompt": "upper", "max_tokens": 12}
            for model in ("lora", "entries", "base"):
                answer = client.post("/v1/completions", json=body | {"model": model})
                assert answer.headers["x-expert"] == model
                text = answer.json()["choices"][0]["text"].strip()
                assert text == served.generated(tiny_llama_dir, library, "upper", model)
            assert client.post("/v1/completions", json=body | {"model": "loar"}).status_code == 404
    finally:
        serve.shutdown()
        ray.shutdown()
