"""From an environment to batches of tokens: the LightningDataModule of every stage.

Each split is tokenised once, in `setup`. So the order of an epoch, and with it the number of supervised tokens of
every gradient-accumulation window over all ranks, is known before the first step: a batch carries that number, and
the loss is divided by it, exactly and without communication. Differs from the released code: (1) items longer than
the limit are dropped and counted, never truncated; (2) supervision comes from where the assistant's turns lie, so
a padding token that equals the end token does no harm; (3) the order of an epoch depends on (seed, epoch) alone and
continues after a resume in the middle of an epoch.

A stage that learns from its own rollouts gets items instead of answers (`learn_from: rollouts`), each as often as it
takes steps on what it rolled out.

Needs `trainer.use_distributed_sampler=false`: the loaders share the items out between the ranks themselves.
"""

from memgen.data.batches import BatchIndex as BatchIndex
from memgen.data.batches import EvalBatch as EvalBatch
from memgen.data.batches import Item as Item
from memgen.data.batches import PromptBatch as PromptBatch
from memgen.data.batches import PromptIndex as PromptIndex
from memgen.data.batches import SFTBatch as SFTBatch
from memgen.data.module import EnvironmentData as EnvironmentData
from memgen.data.replay import Replay as Replay
