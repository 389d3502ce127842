"""The same adapter trained through ia3rt and through PEFT alone, on the same batches: two curves of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ia3rt.bench.study.models import Decoder, Prompt
from ia3rt.bench.study.settings import Budget
from ia3rt.bench.study.training import Descent, Learner, batches, train
from ia3rt.cli.packages import quiet

CURVES = ("ia3rt", "peft")


def curves(
    model: Decoder,
    task: str,
    seed: int,
    prompts: Sequence[Prompt],
    budget: Budget,
    steps: int,
    done: Callable[[int], None],
) -> dict[str, Tensor]:
    """The first `steps` of training, in the model's dtype. PEFT wraps the model afterwards, which is of no use then.

    Returns:
        Losses before each step, float64 [steps], of `ia3rt` and `peft`.
    """
    learner = Learner("ours", (task,), seed)
    model.add("ours", (task,))
    given = {("ours", task): prompts}
    points = train(model, [learner], given, {task: prompts[:1]}, budget, model.losses, done, stop_after=steps)
    model.rt.unpatch()
    with quiet():
        from peft import IA3Config, get_peft_model

        targets, ends = ["k_proj", "v_proj", "down_proj"], ["down_proj"]
        config = IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=ends)
        wrapped = get_peft_model(model.model, config)
    model.model = wrapped.eval()
    descent = Descent([each for each in wrapped.parameters() if each.requires_grad], model.lr, budget)
    theirs = []
    stream = batches(prompts, budget.rows, seed)
    for _ in range(steps):
        batch = next(stream)
        loss = model.losses(batch, task).mean()
        loss.backward()
        descent.step()
        theirs.append(float(loss.detach()))
        done(sum(len(each.ids) for each in batch))
    ours = [each.train_loss for each in points]
    return {who: torch.tensor(losses, dtype=torch.float64) for who, losses in zip(CURVES, (ours, theirs), strict=True)}
