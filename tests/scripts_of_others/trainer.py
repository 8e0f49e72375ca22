# The shape of a project with a Trainer: a data set of its own, a class that trains, and a main with arguments.
import argparse

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset


class SpiralDataset(Dataset):
    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.label = torch.randint(3, (size,), generator=generator)
        radius = torch.rand(size, generator=generator)
        angle = 4 * radius + 2.1 * self.label + 0.2 * torch.randn(size, generator=generator)
        self.point = torch.stack([radius * torch.sin(angle), radius * torch.cos(angle)], 1)

    def __len__(self):
        return len(self.label)

    def __getitem__(self, index):
        return self.point[index], self.label[index]


class Classifier(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = torch.nn.Linear(2, width)
        self.outer = torch.nn.Linear(width, 3)

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x)))


class Trainer:
    def __init__(self, model, train_data, optimizer, gpu_id, save_every):
        self.gpu_id = gpu_id
        self.device = torch.device(f"cuda:{gpu_id}" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.train_data = train_data
        self.optimizer = optimizer
        self.save_every = save_every

    def _run_batch(self, source, targets):
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(source), targets)
        loss.backward()
        self.optimizer.step()

    def _run_epoch(self, epoch):
        print(f"epoch {epoch} | steps {len(self.train_data)}")
        for source, targets in self.train_data:
            self._run_batch(source.to(self.device), targets.to(self.device))

    def train(self, max_epochs):
        self.model.train()
        for epoch in range(max_epochs):
            self._run_epoch(epoch)
            if self.gpu_id == 0 and epoch % self.save_every == 0:
                torch.save(self.model.state_dict(), "checkpoint.pt")


def load_train_objs(width):
    train_set = SpiralDataset(600, seed=0)
    model = Classifier(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train_set, model, optimizer


def main(gpu_id, total_epochs, save_every, batch_size, width):
    dataset, model, optimizer = load_train_objs(width)
    train_data = DataLoader(dataset, batch_size=batch_size, pin_memory=False, shuffle=True)
    trainer = Trainer(model, train_data, optimizer, gpu_id, save_every)
    trainer.train(total_epochs)
    test_set = SpiralDataset(200, seed=1)
    with torch.no_grad():
        found = model(test_set.point).argmax(1)
    print(f"accuracy {(found == test_set.label).float().mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="spirals")
    parser.add_argument("total_epochs", type=int)
    parser.add_argument("save_every", type=int)
    parser.add_argument("--batch_size", default=32, type=int)
    parser.add_argument("--width", default=32, type=int)
    args = parser.parse_args()
    main(0, args.total_epochs, args.save_every, args.batch_size, args.width)
