"""MNIST with a training loop written by hand (DataLoader, zero_grad, backward, step) and fused layers in the model.

python examples/mnist_practice.py
"""

import torch
from torch.utils.data import DataLoader, TensorDataset

from dlkernels.data import load_mnist
from dlkernels.nn import MLP, CrossEntropyLoss

torch.set_printoptions(precision=3)
torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

mnist = load_mnist()
images = mnist.train_x.view(-1, 1, 28, 28)  # as torchvision gives them
test_images = mnist.test_x.view(-1, 1, 28, 28)
train_iter = DataLoader(TensorDataset(images, mnist.train_y), batch_size=256, shuffle=True)
test_iter = DataLoader(TensorDataset(test_images, mnist.test_y), batch_size=256)

# Stock: nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)), nn.CrossEntropyLoss()
model = MLP([784, 256, 10]).to(device)
loss = CrossEntropyLoss()
optm = torch.optim.Adam(model.parameters(), lr=1e-3)


@torch.no_grad()
def accuracy(data_iter: DataLoader) -> float:
    model.eval()
    correct = total = 0
    for batch_in, batch_out in data_iter:
        prediction = model(batch_in.view(-1, 28 * 28).to(device)).argmax(dim=1)
        correct += (prediction == batch_out.to(device)).sum().item()
        total += len(batch_out)
    model.train()
    return correct / total


print(f"accuracy before training: {accuracy(test_iter):.3f}")
for epoch in range(1, 11):
    loss_sum = 0.0
    for batch_in, batch_out in train_iter:
        y_pred = model(batch_in.view(-1, 28 * 28).to(device))
        loss_out = loss(y_pred, batch_out.to(device))
        optm.zero_grad()  # reset the gradients
        loss_out.backward()  # compute new ones
        optm.step()  # update the weights
        loss_sum += loss_out.item()
    mean_loss = loss_sum / len(train_iter)
    print(f"epoch {epoch:2d}  loss {mean_loss:.3f}  accuracy {accuracy(test_iter):.3f}", flush=True)
