"""A worker's part of the index: what its engine's tiers hold goes to etcd.

    engine thread              event loop                                etcd
    NewsCollector ──listener──> UploadPlan.record, touch
                                IndexUploader.run ── fenced writes ────> cache/{worker_id}/{epoch}/
                                heed <── this worker's share ─────────── leader

Nothing here is awaited by a request, and nothing that fails here fails one.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from xllm.cache.event_codec import TierCode, short_hashes
from xllm.cache.tier import TierName
from xllm.cache.upload import IndexUploader
from xllm.cache.upload_budget import SAFE_SHARE, Share
from xllm.cache.upload_plan import UploadPlan, UploadStatistics
from xllm.coordination import Keys, Session
from xllm.protocol import LeaderWord, WorkerId
from xllm.telemetry import Metrics

if TYPE_CHECKING:
    from xllm.cache.news import CacheNews

TIER_CODES = {tier: TierCode[tier.name] for tier in TierName}


class CacheUpload:
    """Publishes from `run` on what `hear` is told at any time; for the event loop's thread."""

    def __init__(self, session: Session, keys: Keys, worker_id: WorkerId, metrics: Metrics) -> None:
        """`workers/{worker_id}` is to be the session's exclusive key before `run`."""
        plan = UploadPlan(SAFE_SHARE, random.Random())
        self._uploader = IndexUploader(session, keys, worker_id, plan)
        self._worker_id = worker_id
        self._metrics = metrics
        self._counted = plan.statistics()

    def hear(self, news: CacheNews) -> None:
        """A listener of the engine's `cache_news`."""
        for tier, events in news.changes:
            self._uploader.record(TIER_CODES[tier], events)
        for chain in news.used:
            self._uploader.touch(short_hashes(chain))

    def heed(self, word: LeaderWord) -> None:
        """The leader has divided the budget anew."""
        share = word.share_of(self._worker_id)
        if share is not None:
            limit = {"max_blocks": share.max_blocks} if share.max_blocks else {}
            self._uploader.set_share(Share(share.puts_per_s, share.bytes_per_s, **limit))

    async def run(self) -> None:
        """Until cancelled."""
        await self._uploader.run()

    def statistics(self) -> UploadStatistics:
        return self._uploader.statistics()

    def collect(self) -> None:
        """Brings the metrics up to date."""
        now, before = self._uploader.statistics(), self._counted
        self._counted = now
        metrics = self._metrics
        metrics.index_published_blocks.set(now.num_published)
        metrics.index_pending_blocks.set(now.num_dirty)
        metrics.index_upload_puts.inc(now.num_writes - before.num_writes)
        metrics.index_upload_bytes.inc(now.num_bytes - before.num_bytes)
