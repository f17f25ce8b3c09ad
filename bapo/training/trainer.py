"""BAPOTrainer: TRL's DPOTrainer with a base response beside every pair, and the prompt computed once."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from trl import DPOConfig, DPOTrainer

from bapo.inference.scoring import branch_logps
from bapo.training.objectives import METHODS, Logps, anchor, margins
from bapo.training.packing import collate_packed_pairs

COLUMNS = [
    *("prompt_ids", "chosen_ids", "rejected_ids", "base_ids"),
    *("ref_chosen_logps", "ref_rejected_logps", "ref_base_logps"),
]


class BAPOTrainer(DPOTrainer):
    """Trains a policy with one of `METHODS` (arXiv 2407.00693, Eq. 4 to 6).

    Datasets come tokenised and with reference log-probs: one row per pair with the columns `COLUMNS`
    (`bapo.training.run` makes them). Beside DPOTrainer's metrics `loss`, `logps/chosen`,
    `logps/rejected`, `rewards/accuracies` and `rewards/margins` it logs `logps/base`, the change of
    each against the reference as `logps_change/…` (the curves of the paper's Figures 5, 6 and 9),
    `drift` (nats, reference − policy, of the base response) and the two terms of the loss.
    """

    _tag_names = ["trl", "bapo"]  # noqa: RUF012 (as DPOTrainer declares it)
    _name = "BAPO"

    def __init__(self, model, *, method: str, lambda_: float, args: DPOConfig, processing_class, **kwargs):
        self.objective = METHODS[method]
        self.lambda_ = lambda_
        args.remove_unused_columns = False  # the collator reads every column
        super().__init__(
            model, args=args, data_collator=collate_packed_pairs, processing_class=processing_class, **kwargs
        )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        missing = [column for column in COLUMNS if column not in dataset.column_names]
        if missing:
            raise ValueError(f"the {dataset_name} dataset lacks the columns {', '.join(missing)}")
        return dataset.select_columns(COLUMNS)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        prompts = [tuple(ids) for ids in dataset["prompt_ids"]]
        return PromptOrderSampler(prompts, self.args.seed)

    def _compute_loss(self, model, inputs, return_outputs):
        # `model` may be wrapped for several processes; the head is found on the bare model.
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        logps = branch_logps(model, head, inputs)
        policy = Logps(*(logps[inputs[f"{role}_branch"]] for role in Logps._fields))
        reference = Logps(*(inputs[f"ref_{role}_logps"] for role in Logps._fields))
        loss = self.objective(policy, reference, self.beta, self.lambda_).mean()
        self._record(policy, reference)
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def _record(self, policy: Logps, reference: Logps) -> None:
        margin = margins(policy, reference, self.beta)
        drift = reference.base - policy.base
        values = {
            "rewards/accuracies": (margin > 0).float(),
            "rewards/margins": margin,
            "rewards/chosen": self.beta * (policy.chosen - reference.chosen),
            "rewards/rejected": self.beta * (policy.rejected - reference.rejected),
            "drift": drift,
            "loss/preference": -F.logsigmoid(margin),
            "loss/anchor": anchor(policy, reference),
        }
        for role in Logps._fields:
            values[f"logps/{role}"] = getattr(policy, role)
            values[f"logps_change/{role}"] = getattr(policy, role) - getattr(reference, role)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in values.items():
            metrics[name].append(self.accelerator.gather(value).mean().item())


class PromptOrderSampler(Sampler[int]):
    """Every pair once an epoch, prompts in random order, the pairs of a prompt side by side.

    Neighbours share a tree, so this order is what makes packing pay.
    """

    def __init__(self, prompts: list[tuple[int, ...]], seed: int):
        self.rows: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            self.rows.setdefault(prompt, []).append(row)
        self.count = len(prompts)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        groups = list(self.rows.values())
        for group in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[group]

    def __len__(self) -> int:
        return self.count
