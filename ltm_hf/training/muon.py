"""Muon for the hidden matrices of the decoder, beside AdamW for all else, as one optimiser."""

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` on groups of their own, with one state and one list of groups.

    Schedulers, checkpoints and accelerate see an ordinary optimiser. Groups with `"muon": True` hold matrices.
    Muon computes in bfloat16, which amplifies rounding: gradients that differ by a millionth, as those of two ways to
    shard a model do, give updates that differ by some percent.

    model: its hidden matrices are for Muon; embeddings, head, norms, gates, biases and addresses for AdamW.
    learning_rate: of AdamW. muon_learning_rate: of Muon, whose updates are scaled to the size (RMS) of AdamW's, so that
        one weight decay can serve both (Liu et al. 2025).
    weight_decay: on matrices only. adamw: other arguments of AdamW.
    """

    def __init__(self, model, learning_rate, muon_learning_rate, weight_decay=0.0, **adamw):
        embeddings = {
            id(module.weight)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Embedding) or name.split(".")[-1] == "lm_head"
        }
        matrices, decayed, others = [], [], []
        for parameter in model.parameters():
            if parameter.requires_grad:
                kind = others if parameter.ndim != 2 else decayed if id(parameter) in embeddings else matrices
                kind.append(parameter)
        # What is logged is the learning rate of the first group.
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=learning_rate,
            **adamw,
        )
        self._muon = torch.optim.Muon(
            [{"params": matrices}],
            lr=muon_learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        groups = [{**group, "muon": False} for group in self._adamw.param_groups]
        groups += [{**group, "muon": True} for group in self._muon.param_groups]
        super().__init__(groups, {})

    @classmethod
    def of_trainer(cls, trainer, model) -> "MuonWithAdamW":
        """As a `Trainer`'s arguments say."""
        args = trainer.args
        _, adamw = trainer.get_optimizer_cls_and_kwargs(args, model)
        return cls(model, adamw.pop("lr"), args.muon_learning_rate, args.weight_decay, **adamw)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, is_muon in ((self._adamw, False), (self._muon, True)):
            optimizer.state = self.state  # here alone: loading a checkpoint replaces state and groups
            optimizer.param_groups = [group for group in self.param_groups if group["muon"] is is_muon]
            optimizer.step()
        return loss
