"""Serve a library on a cluster by Ray Serve, whose replicas come and go with the number of requests.

    pip install 'modular-experts[serve]' 'ray[serve]'
    serve run deploy.ray_serve:app library=/shared/library replicas=4

Every node must see the library, and the base, at the same place. Each replica has the base, reads experts as requests
name them, and answers `rows` requests at a time.
"""

import os
from typing import Any

from ray import serve

from modular_experts.base import Base
from modular_experts.base.device import device
from modular_experts.library import Library
from modular_experts.serving.answers import Answerer
from modular_experts.serving.app import Limits, make_app
from modular_experts.serving.engine import Engine
from modular_experts.serving.models import Models


def app(settings: dict[str, Any]) -> serve.Application:
    """Return the application; `serve run` passes what stands behind it on the command line.

    Args:
        settings: `library`, the directory of the experts. `base`, its directory or hub id, is the one in the experts'
            records if not given. A replica answers up to `rows` requests at a time (16), and there are up to `replicas`
            (2), each with as many GPUs as `gpus` says (0).
    """
    library, rows = os.path.abspath(settings["library"]), int(settings.get("rows", 16))

    def build() -> Any:
        experts = Library(library)
        base = Base.open(settings.get("base"), [] if "base" in settings else [experts[next(iter(experts))]])
        model: Any = base.load(settings.get("dtype", "float32"))
        tokenizer: Any = base.tokenizer()
        models = Models(library, base.fingerprint, base.place, settings.get("auto"))
        engine = Engine(model.to(device()), rows)
        return make_app(Answerer(models, engine, tokenizer), Limits(api_key=os.environ.get("MODULAR_EXPERTS_API_KEY")))

    @serve.deployment(
        name="modular-experts",
        max_ongoing_requests=4 * rows,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": int(settings.get("replicas", 2)),
            "target_ongoing_requests": rows,
        },
        ray_actor_options={"num_gpus": float(settings.get("gpus", 0))},
    )
    @serve.ingress(build)
    class Replica:
        pass

    return Replica.bind()
