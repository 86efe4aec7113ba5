"""The order of images: one for any number of ranks, and a resumed epoch that goes on where it stopped."""

import multiprocessing
import socket
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from kdq_lightning.data.images import ImageSet
from kdq_lightning.data.sampler import GlobalBatchSampler, ResumableLoader
from kdq_lightning.errors import UserError


def batches(sampler):
    return [batch.tolist() for batch in sampler]


def shares(images, batch_size, world_size, **options):
    """Each rank's batches, as lists."""
    return [
        batches(GlobalBatchSampler(torch.arange(images), batch_size, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]


@given(st.integers(1, 70), st.integers(1, 24), st.integers(1, 4), st.booleans())
def test_evaluation_visits_every_image_once_over_the_ranks(images, batch_size, world_size, shuffle):
    alone = shares(images, batch_size, 1, shuffle=shuffle)[0]
    assert sorted(chain(*alone)) == list(range(images))
    ranks = shares(images, batch_size, world_size, shuffle=shuffle)
    assert {len(rank) for rank in ranks} == {len(alone)}
    for step, whole in enumerate(alone):
        blocks = [rank[step] for rank in ranks]
        assert list(chain(*blocks)) == whole
        assert all(len(block) % 2 == 0 for block in blocks[:-1])


@given(st.integers(1, 70), st.integers(1, 6), st.integers(1, 4))
def test_training_drops_the_incomplete_batch_and_shares_evenly(images, pairs, world_size):
    batch_size = 2 * world_size * pairs
    if images < batch_size and world_size > 1 and images % (2 * world_size):
        with pytest.raises(UserError, match=f"multiple of {2 * world_size}"):
            shares(images, batch_size, world_size, shuffle=True, drop_last=True)
        return
    ranks = shares(images, batch_size, world_size, shuffle=True, drop_last=True)
    size = min(batch_size, images)
    assert all(len(rank) == images // size for rank in ranks)
    assert {len(block) for rank in ranks for block in rank} == {size // world_size}
    visited = [image for rank in ranks for block in rank for image in block]
    assert len(set(visited)) == len(visited) == images // size * size


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = GlobalBatchSampler(torch.arange(100), 10, seed=seed, shuffle=True)
        sampler.set_epoch(epoch)
        return batches(sampler)

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_every_place_is_equally_likely():
    firsts = torch.zeros(5)
    sampler = GlobalBatchSampler(torch.arange(5), 5, shuffle=True)
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        firsts[next(iter(sampler))[0]] += 1
    assert (firsts - 400).abs().max() < 80  # 4.5 standard deviations


def test_a_restored_position_goes_on_with_the_next_batch():
    sampler = GlobalBatchSampler(torch.arange(40), 4, shuffle=True)
    sampler.set_epoch(3)
    whole = batches(sampler)
    iterator = iter(sampler)
    begun = [next(iterator).tolist() for _ in range(4)]
    state = sampler.state_dict()

    other = GlobalBatchSampler(torch.arange(40), 4, shuffle=True)
    other.load_state_dict(state)
    assert other.state_dict() == state
    resumed = iter(other)  # Lightning makes the iterator first and sets the epoch then
    other.set_epoch(3)
    assert begun + [batch.tolist() for batch in resumed] == whole
    assert batches(other) == whole  # the position is used once
    other.load_state_dict(state)
    other.set_epoch(4)  # the checkpoint stood at the end of a shortened epoch
    assert len(batches(other)) == len(whole)


class Recorder(LightningModule):
    """Writes down the images of each step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.index.tolist()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbers(LightningDataModule):
    def setup(self, stage):
        self.images = ImageSet(torch.zeros(24, 3, 2, 2, dtype=torch.uint8), torch.zeros(24).long(), ["only"])

    def train_dataloader(self):
        sampler = GlobalBatchSampler(torch.arange(24), 4, seed=5, shuffle=True, drop_last=True)
        return ResumableLoader(self.images, sampler=sampler, batch_size=None, collate_fn=lambda batch: batch)

    def val_dataloader(self):
        return self.train_dataloader()


def run(folder, resume=None, epochs=3, every=1, **options):
    module = Recorder()
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=every)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[saving], logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=Numbers(), ckpt_path=resume, weights_only=True if resume else None)
    return module.seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_train_batches": 4},
        {"limit_val_batches": 0},
        {"val_check_interval": 2},
        {"accumulate_grad_batches": 2},
        {"epochs": -1, "max_steps": 18},
    ],
    ids=str,
)
def test_lightning_resumes_from_every_step(tmp_path, options):
    whole = run(tmp_path, **options)
    per_epoch = options.get("limit_train_batches", 6)
    assert len(whole) == 3 * per_epoch
    assert len({str(whole[epoch * per_epoch][1]) for epoch in range(3)}) == 3  # set_epoch was called
    batches_a_step = options.get("accumulate_grad_batches", 1)
    for step in range(1, len(whole) // batches_a_step):
        resumed = run(tmp_path / "again", tmp_path / f"step={step}.ckpt", every=1000, **options)
        assert resumed == whole[step * batches_a_step :], f"from step {step}"


def _gather(rank, world_size, port, queue):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    sampler = GlobalBatchSampler(torch.arange(44), 8, seed=1, shuffle=True, drop_last=True, rank=rank, world_size=2)
    sampler.set_epoch(2)
    steps = []
    for block in sampler:
        blocks = [torch.empty_like(block) for _ in range(world_size)]
        torch.distributed.all_gather(blocks, block)
        steps.append(torch.cat(blocks).tolist())
    if rank == 0:
        queue.put(steps)
    torch.distributed.destroy_process_group()


def test_two_processes_see_the_global_batches_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_gather, args=(rank, 2, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    together = queue.get(timeout=120)
    for process in processes:
        process.join()
    alone = GlobalBatchSampler(torch.arange(44), 8, seed=1, shuffle=True, drop_last=True)
    alone.set_epoch(2)
    assert together == batches(alone)
