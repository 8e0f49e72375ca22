"""Messages that are sent to clients and waited for together: who has replied, and whose reply was rejected and why."""

from dataclasses import dataclass, field

from flwr.app import Message

from federation.app import metrics
from federation.app.console import emit_event


@dataclass
class Exchange:
    """Messages that are sent and waited for together."""

    doing: str  # what the clients are doing, in a word
    count: int
    pending: dict[str, Message]  # the questions without a reply, by their ids
    shown: int = -1  # how many replies the terminal knows of
    good: list[Message] = field(default_factory=list)
    rejected: dict[str, list[int]] = field(default_factory=dict)  # positions by reason
    failed: str = ""  # why the first one failed that had not just left or was late

    def reject(self, question: Message, why: str, failed: bool = False) -> None:
        self.failed = self.failed or why * failed
        self.rejected.setdefault(why, []).append(question.metadata.dst_node_id)

    def reject_minority(self) -> None:
        """Reject the replies that report other metrics than most others."""
        for reply in metrics.minority(sorted(self.good, key=lambda reply: reply.metadata.src_node_id)):
            self.good.remove(reply)
            named = ", ".join(sorted(reply.content.metric_records["metrics"]))
            why = f"it reports other metrics than most clients: {named:.200}"
            self.rejected.setdefault(why, []).append(reply.metadata.src_node_id)

    def show_progress(self) -> None:
        """Tell the terminal, where that has changed, how many clients have replied."""
        done = self.count - len(self.pending)
        if done != self.shown and self.count:
            emit_event(progress=(done, self.count), doing=self.doing)
            self.shown = done
