"""LightNet on handwritten digits of 28 x 28 pixels (MNIST's files), 7 x 7 patches of 4 x 4.

SCANAX_DATA=... python -m scanax.train.main --config configs/lightnet_mnist.py --workdir runs/mnist

The file in data.path is cut in two: a tenth of its images is held out. With the 60,000 training
images, name the test images in data.eval_path.
"""

from scanax.configs import datasets, lightnet_digits


def get_config():
    config = lightnet_digits.get_config()
    config.num_steps = 1500
    config.model.patch_size = (4, 4)
    config.data.update(datasets.files("mnist_t10k/t10k-images-idx3-ubyte.gz"))
    config.data.crop_padding = 2
    return config
