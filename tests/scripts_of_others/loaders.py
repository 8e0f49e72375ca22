# The shape of a small project in one file: functions that build loaders and model, an epoch that returns its results.
import torch
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

BATCH_SIZE = 32
LEARNING_RATE = 1e-3
NUM_CLASSES = 10
NUM_EPOCHS = 2


def get_loaders(data_dir="data", batch_size=BATCH_SIZE):
    augment = transforms.Compose([transforms.RandomCrop(28, padding=2), transforms.ToTensor()])
    train_set = MNIST(data_dir, train=True, download=True, transform=augment)
    val_set = MNIST(data_dir, train=False, download=True, transform=transforms.ToTensor())
    train_loader = DataLoader(train_set, batch_size=batch_size, shuffle=True)
    val_loader = DataLoader(val_set, batch_size=batch_size)
    return train_loader, val_loader


def build_model(num_classes, hidden=64):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, num_classes))


def train_one_epoch(model, loader, criterion, optimizer, device):
    model.train()
    running_loss = 0.0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item() * images.size(0)
    return running_loss / len(loader.dataset)


@torch.no_grad()
def evaluate(model, loader, criterion, device):
    model.eval()
    val_loss, correct = 0.0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        outputs = model(images)
        val_loss += criterion(outputs, labels).item() * images.size(0)
        correct += (outputs.argmax(1) == labels).sum().item()
    accuracy = correct / len(loader.dataset)
    return val_loss / len(loader.dataset), accuracy


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader, val_loader = get_loaders()
    model = build_model(NUM_CLASSES).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.Adam(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    for epoch in range(NUM_EPOCHS):
        train_loss = train_one_epoch(model, train_loader, criterion, optimizer, device)
        val_loss, val_acc = evaluate(model, val_loader, criterion, device)
        print(f"epoch {epoch + 1}/{NUM_EPOCHS}: {train_loss:.4f} {val_loss:.4f} {val_acc:.4f}")


if __name__ == "__main__":
    main()
