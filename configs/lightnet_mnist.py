"""LightNet on handwritten digits of 28 x 28 pixels (MNIST's files), 7 x 7 patches of 4 x 4.

SCANAX_DATA=... python -m scanax.train.main --config configs/lightnet_mnist.py --workdir runs/mnist

The file in data.path is cut in two: a tenth of its images is held out. With the 60,000 training
images, name the test images in data.eval_path.

Expect 95.8 % of the held-out images after 1,500 steps, the mean of 3 seeds, in about 5 minutes.
Without parts:

  SCANAX_DATA=... python -m scanax.train.sweep --config configs/lightnet_mnist.py \\
      --workdir runs/mnist_sweep --metrics accuracy,loss \\
      --grid "model.mixer:model.tpe:model.use_lrpe=lightnet:bidirectional:true,lightnet:none:true,\\
  lightnet:bidirectional:false,lightnet:none:false,gla_two_scans:bidirectional:true,softmax:bidirectional:true"
"""

from scanax.configs import datasets, lightnet_digits


def get_config():
    config = lightnet_digits.get_config()
    config.num_steps = 1500
    config.model.patch_size = (4, 4)
    config.data.update(datasets.files("mnist_t10k/t10k-images-idx3-ubyte.gz"))
    config.data.crop_padding = 2
    return config
