"""BAPOTrainer: TRL's DPOTrainer with a base response beside every pair, and the prompt computed once."""

import logging
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler
from trl import DPOConfig, DPOTrainer

from bapo.inference.scoring import branch_logps
from bapo.inference.tree_attention import limits_of
from bapo.training.objectives import METHODS, Logps, anchor, margins
from bapo.training.packing import PairCollator

logger = logging.getLogger(__name__)

COLUMNS = [
    *("prompt_ids", "chosen_ids", "rejected_ids", "base_ids"),
    *("ref_chosen_logps", "ref_rejected_logps", "ref_base_logps"),
]


PAPER = "BAPO: Base-Anchored Preference Optimization for Overcoming Forgetting in Large Language Models Personalization"

CITATION = f"""\
@article{{lee2024bapo,
    title  = {{{PAPER}}},
    author = {{Gihun Lee and Minchan Jeong and Yujin Kim and Hojung Jung and Jaehoon Oh and
              Sangmook Kim and Se-Young Yun}},
    year   = 2024,
    eprint = {{arXiv:2407.00693}}
}}"""

# Metrics that an anchor-only prompt has no share in.
PAIR_METRICS = {
    *("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "loss/preference"),
    *("logps/chosen", "logps/rejected", "logps_change/chosen", "logps_change/rejected"),
}


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
    _paper = {"title": PAPER, "id": "2407.00693", "citation": CITATION}  # noqa: RUF012

    def __init__(self, model, *, method: str, lambda_: float, args: DPOConfig, processing_class, **kwargs):
        self.objective = METHODS[method]
        self.lambda_ = lambda_
        self._scored: list[tuple[Logps, Logps, Tensor]] = []
        args.remove_unused_columns = False  # the collator reads every column
        limits = limits_of(model)
        if not limits.trees:
            logger.warning(
                "%s cannot read packed prompts: padded rows are used, which is slower", model.config.model_type
            )
        super().__init__(
            model, args=args, data_collator=PairCollator(limits), processing_class=processing_class, **kwargs
        )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        missing = [column for column in COLUMNS if column not in dataset.column_names]
        if missing:
            raise ValueError(f"the {dataset_name} dataset lacks the columns {', '.join(missing)}")
        return dataset.select_columns(COLUMNS)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        prompts = [tuple(ids) for ids in dataset["prompt_ids"]]
        paired = [row["chosen_ids"] != row["rejected_ids"] for row in dataset]
        return PromptOrderSampler(prompts, paired, self.args.seed)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Each packed sequence forwards and backwards before the next: memory holds one at a time."""
        *earlier, last = inputs["parts"]
        loss = torch.zeros((), device=self.args.device)
        for part in earlier:
            with self.accelerator.no_sync(model):  # several processes exchange gradients once, with the last
                loss = loss + super().training_step(model, {"parts": [part]}, num_items_in_batch)
        loss = loss + super().training_step(model, {"parts": [last]}, num_items_in_batch)
        self._record()
        return loss

    def _compute_loss(self, model, inputs, return_outputs):
        """The parts' contribution to the mean over the batch's pairs."""
        bare = self.accelerator.unwrap_model(model)  # `model` may be wrapped for several processes
        loss = torch.zeros((), device=self.args.device)
        for part in inputs["parts"]:
            logps = branch_logps(model, bare, part["sequence"], part["late"])
            policy = Logps(*(logps[part[f"{role}_branch"]] for role in Logps._fields))
            reference = Logps(*(part[f"ref_{role}_logps"] for role in Logps._fields))
            losses = self.objective(policy, reference, self.beta, self.lambda_)
            # An anchor-only prompt has no preference to learn: its constant log 2 is not part of the loss.
            paired = part["chosen_branch"] != part["rejected_branch"]
            loss = loss + part["share"] * torch.where(paired, losses, losses - math.log(2)).mean()
            self._scored.append((Logps(*(one.detach() for one in policy)), reference, paired))
        if not self.model.training:
            self._record()
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def _record(self) -> None:
        """Turn what was scored since the last call, one batch, into metrics."""
        policies, references, pairings = zip(*self._scored, strict=True)
        self._scored.clear()
        policy, reference = (Logps(*map(torch.cat, zip(*parts, strict=True))) for parts in (policies, references))
        paired = torch.cat(pairings)
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
        everywhere = self.accelerator.gather(torch.stack([paired.float(), *values.values()], 1))
        for column, name in enumerate(values, start=1):
            rows = everywhere[everywhere[:, 0] == 1] if name in PAIR_METRICS else everywhere
            if len(rows):
                metrics[name].append(rows[:, column].mean().item())


class PromptOrderSampler(Sampler[int]):
    """Every row once an epoch, prompts in random order, the pairs of a prompt side by side.

    Neighbours share a tree, so this order is what makes packing pay. Anchor-only prompts (not `paired`)
    are spread evenly between the others, so that every step has its share of them.
    """

    def __init__(self, prompts: list[tuple[int, ...]], paired: list[bool], seed: int):
        self.groups: dict[tuple[int, ...], list[int]] = {}
        self.anchors: list[int] = []
        for row, prompt in enumerate(prompts):
            if paired[row]:
                self.groups.setdefault(prompt, []).append(row)
            else:
                self.anchors.append(row)
        self.count = len(prompts)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        groups = list(self.groups.values())
        order = torch.randperm(len(groups), generator=generator).tolist()
        anchors = torch.randperm(len(self.anchors), generator=generator).tolist()
        given = 0
        for number, group in enumerate(order, start=1):
            yield from groups[group]
            due = number * len(anchors) // len(groups)
            yield from (self.anchors[anchor] for anchor in anchors[given:due])
            given = due

    def __len__(self) -> int:
        return self.count
