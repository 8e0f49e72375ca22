"""Federate cifar.py, or any other task, without changing a line of it: a client.

    python client.py                                  # joins the server on this machine
    python client.py --server HOST:PORT --data DIR    # joins another one, with the data in DIR

Flower calls `train` and `evaluate` when the server asks for them. Neither has a training loop: they call the task's
own `train` and `test`, with the global model and with the samples of this client.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from federation.app import client_privacy, cores, hide_tensorflow, membership
from federation.app.client_state import keep_state
from federation.app.job import Job
from federation.app.mods import explain, play_clients
from federation.app.packing import packed_replies
from federation.app.upload import send_changes

app = ClientApp(mods=[packed_replies, play_clients, explain, keep_state, send_changes, client_privacy.protect])
app.query("join")(membership.join)
app.query("leave")(membership.leave)
hide_tensorflow.from_workers()  # here, as Flower imports this file before it starts Ray
cores.use_one_blas_thread()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this client's training samples; reply with the new model."""
    job = Job(message, context)
    data = job.samples("train")
    net = job.global_model(job.seed)
    with job.correcting(net):  # its gradients, where the strategy does
        result = job.task.train(net, data, seed=job.seed, **job.settings)
    return job.reply(data, result, net)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the global model on this client's test samples; reply with what came out."""
    job = Job(message, context)
    data = job.samples("test")
    net = job.global_model(job.config.seed)
    result = job.task.test(net, data)
    return job.reply(data, result)


if __name__ == "__main__":
    from federation.launch import client_command  # here, because a process that answers a message launches nothing

    client_command.main()
