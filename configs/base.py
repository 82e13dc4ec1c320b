"""Every configuration key, once, with its default: one file, however long, to look a key up in.

A config file returns ``base.get_config(task, family)`` with what differs. What the keys mean to the
code, and which values are valid, stands with the code that reads them:

  Config            train/config.py         DeltaProductConfig  models/delta_product/config.py
  OptimizerConfig   train/optimizer.py      WordProblemConfig   train/tasks/word_problem.py
  MeshConfig        train/mesh.py           TextConfig          train/data/text.py
  MLPConfig         models/mlp.py           FormalLanguageConfig  train/tasks/formal_language.py
  ConvNetConfig     models/convnet.py
  RADDConfig        models/radd/config.py   MaskedObjectiveConfig, MaskedSamplerConfig
                                               train/tasks/masked_config.py
  RMoEConfig, RMoESeqConfig
                    models/rmoe/config.py
  LightNetLMConfig, LightNetGridConfig      ImageConfig         train/data/image_sources.py
                    models/lightnet/config.py  MaskedTextConfig
                                               train/tasks/masked_language_model.py
  VelocityMLPConfig models/rectified_flow/mlp.py
  NCSNppConfig, SongUNetConfig, DhariwalUNetConfig  models/unet/config.py
  DiTConfig         models/dit.py           FlowImageConfig     train/data/flow.py
  ObjectiveConfig, SamplerConfig            MixtureConfig       train/data/mixtures.py
                    train/tasks/flow_config.py

Any key can be set from the command line: ``--config.optimizer.learning_rate=1e-3``.
"""

import ml_collections


def get_config(task: str, family: str = "") -> ml_collections.ConfigDict:
    """All keys of a run of ``task``, at their defaults.

    Args:
      task: a key of ``_MODEL``.
      family: of the model; "" for the first that the task has.
    """
    family = family or next(iter(_MODEL[task]))
    return ml_collections.ConfigDict(
        {
            "task": task,  # what is trained: a file of train/tasks
            "family": family,  # what kind of model: see models; it decides the keys of model
            "seed": 0,  # of the parameters and of all noise in training
            "num_steps": 1000,  # updates
            "batch_size": 64,  # examples per update, over all devices
            "microbatches": 1,  # an update's batch is computed in this many parts
            "max_bad_steps": 10,  # stop after so many non-finite updates in a row
            "init_from": "",  # a run's folder, whose parameters this run starts from
            "model": _MODEL[task][family](),
            "data": _DATA[task](),
            "objective": _OBJECTIVE.get(task, dict)(),
            "sampler": _SAMPLER.get(task, dict)(),
            "optimizer": {
                "learning_rate": 1e-3,  # peak
                "schedule": "cosine",  # constant, cosine or wsd, after the warmup
                "warmup_steps": 0,  # linear from 0
                "decay_steps": 0,  # wsd only: length of the final linear decay
                "final_fraction": 0.0,  # rate at the end, as a fraction of the peak
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "decay_mask": "matrices",  # what is decayed: matrices, or all
                "clip_norm": 0.0,  # of the global gradient; 0 = no clipping
                "ema_decay": 0.0,  # average of the parameters used for evaluation; 0 = none
                "ema_start": "warmup",  # how it begins: warmup, constant or halflife
                "freeze": (),  # regular expressions: parameters that stay as they are...
                "freeze_from": 0,  # ...from this step on
            },
            "evaluation": {
                "every_steps": 0,  # 0 = at the end only
                "batches": 4,  # per evaluation, at most (of streams: blocks); 0 = the whole set
                "batch_size": 64,
                "seed": 1234,  # of the evaluation data and noise
                "samples": 16,  # samples drawn at the end; 0 = none
                "stop_when": "",  # METRIC>=NUMBER or <=: end the run once that is reached
            },
            "checkpoint": {
                "every_steps": 500,  # and always at the end
                "keep": 3,  # newest checkpoints that stay
                "asynchronous": True,  # write while training goes on
            },
            "mesh": {  # devices along each axis; one may be -1: all that are left
                "data": -1,
                "fsdp": 1,
                "tensor": 1,
                "expert": 1,
                "sequence": 1,
            },
            "log": {
                "every_steps": 50,
                "profile_start": -1,  # first step of a profiler trace; -1 = none
                "profile_steps": 5,
            },
        }
    )


def _delta_product() -> dict:
    return {
        "vocab_size": 0,  # 0 = what the data needs
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_heads": 4,
        "num_v_heads": 0,  # 0 = num_heads
        "head_dim": 16,
        "expand_v": 1.0,
        "num_householder": 2,
        "intermediate_size": 0,  # 0 = 8/3 hidden_size, rounded up to a multiple of 256
        "use_short_conv": True,
        "conv_size": 4,
        "activation": "silu",  # of q, k, v: silu or identity
        "use_forget_gate": False,
        "use_output_gate": True,
        "allow_neg_eigval": True,
        "tie_word_embeddings": False,
        "norm_eps": 1e-6,
        "initializer_range": 0.02,
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": False,
        "implementation": "auto",  # of the scan
    }


def _lightnet() -> dict:
    return {
        "mixer": "lightnet",  # or, in its place: softmax, linear, gla or gla_two_scans
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 0,  # of queries and keys; 0 = hidden_size / num_heads
        "scale": 0.0,  # of queries; 0 = head_dim**-0.5
        "output_gate": "silu",  # silu, sigmoid or none
        "gate_low_rank_dim": 16,
        "elementwise_affine": True,  # weights of the output norm
        "intermediate_size": 0,  # 0 = 8/3 hidden_size, rounded up to a multiple of 256
        "use_short_conv": False,
        "conv_size": 4,
        "tpe": "bidirectional",  # positions on the embedding: none, causal or bidirectional
        "tpe_share_axes": False,
        "use_lrpe": True,  # positions in every layer
        "theta_type": 0,  # their rates: 0, a range per head, or 1 to 6, the published tables
        "learn_theta": False,
        "norm_eps": 1e-6,
        "initializer_range": 0.02,
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": False,
        "implementation": "auto",  # of the scan
    }


def _lightnet_lm(causal: bool) -> dict:
    return {
        **_lightnet(),
        "tpe": "causal" if causal else "bidirectional",
        "vocab_size": 0,  # 0 = what the data needs
        "tie_word_embeddings": False,
        "causal": causal,
    }


def _lightnet_grid() -> dict:
    return {
        **_lightnet(),
        "patch_size": (2, 2),  # one number per axis of the grid
        "class_token": False,  # classify a token of its own, not the mean
        "drop_path": 0.0,  # stochastic depth, of the last layer
    }


def _mixture() -> dict:
    return {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_heads": 4,
        "intermediate_size": 64,  # of an expert
        "num_experts": 8,
        "experts_per_token": 2,
        "router_cell": "gru",  # gru, rnn, lstm, or none: an ordinary router
        "router_memory": "full",  # full, none (NP) or detach
        "router_projector": True,
        "router_dim": 32,
        "router_head": "linear",  # or random, mlp, hyper, xmoe, xmoe_code, cosine, cosine_code
        "router_head_dim": 16,
        "router_residual": 0.0,  # of the logits of the layer before
        "router_residual_detach": False,
        "router_residual_cumulative": False,
        "router_normalise": True,  # weights of the chosen experts sum to 1
        "capacity_factor": 0.0,  # 0 = no token is dropped
        "capacity_policy": "score",  # who keeps a place: score or position
        "balance_coefficient": 0.01,
        "z_coefficient": 0.0,
        "router_balance_rate": 0.0,  # of preferences for experts rarely chosen; 0 = none
        "vocab_size": 0,  # 0 = what the data needs
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": False,
        "implementation": "auto",  # of the experts
    }


def _rmoe() -> dict:
    return {
        **_mixture(),
        "mixer": "attention",  # of tokens: attention, delta_product or lightnet
        "num_kv_heads": 0,  # attention: of keys and values; 0 = num_heads
        "rope_theta": 1e4,  # attention
        "num_householder": 2,  # delta_product
        "use_forget_gate": False,  # delta_product
        "use_short_conv": True,  # delta_product
        "num_dense_layers": 0,  # the first layers, without experts
        "dense_intermediate_size": 0,
        "shared_expert_size": 0,  # an expert for all tokens; 0 = none
        "shared_weight": 0.5,
        "moe_weight": 0.5,
        "moe_bias": False,
        "router_bias": False,
        "balance_form": "pooled",  # pooled, layer_mean or layer_sum
        "norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    }


def _rmoe_seq() -> dict:
    return {
        **_mixture(),
        "span": 128,  # tokens before it that a token sees
        "dropout": 0.0,
        "router_bias": True,
        "balance_form": "layer_sum",  # pooled, layer_mean or layer_sum
        "norm_eps": 1e-5,
    }


def _radd() -> dict:
    return {
        "vocab_size": 0,  # 0 = what the data needs
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "dropout": 0.0,
        "rope_theta": 1e4,
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": False,
    }


def _word_problem() -> dict:
    return {
        "group": "S3",  # S3, S4, A5 or S5
        "seed": 0,  # of the training words
        "length": 128,  # elements in a training row, BOS not counted
        "curriculum_lengths": (),  # rows are packed with words of these lengths instead...
        "curriculum_steps": (),  # ...from these steps on
        "eval_lengths": (128, 256, 512, 1024),
        "limit_to": 0,  # elements that move at most so many points; 0 = all
        "only_swaps": False,  # the identity and transpositions
        "tokens_per_element": 1,  # more: fillers behind each element, the label on the last
    }


def _formal_language() -> dict:
    return {
        "language": "parity",  # parity, modular_arithmetic or modular_arithmetic_brackets
        "modulus": 5,  # of the arithmetic
        "seed": 0,  # of the training words
        "lengths": (3, 40),  # shortest and longest training word, in tokens
        "curriculum_lengths": (),  # the longest is one of these instead...
        "curriculum_steps": (),  # ...from these steps on
        "eval_lengths": (40, 256),
        "row_tokens": 256,  # of a training row, packed with words
    }


def _text() -> dict:
    return {
        "source": "embedded",  # embedded, files or tfds
        "path": "",  # files: a file, glob, folder or place in a zip, relative to SCANAX_DATA
        "eval_path": "",  # files: evaluation text; empty = hold some of path out
        "name": "",  # tfds: the dataset
        "data_dir": "",  # tfds: where it is prepared; empty = TFDS's own default
        "split": "train",  # tfds
        "eval_split": "",  # tfds: empty = hold some of split out
        "text_key": "text",  # tfds: the feature with the text
        "separator": "",  # files: between the documents of a file; empty = a file is one
        "clean": "none",  # gutenberg, wikitext, ptb, lm1b or lambada
        "holdout": "hash",  # hash: whole documents; tail: the end of every document
        "eval_fraction": 0.1,  # held out, if nothing else is given
        "tokenizer": "byte",  # byte, char, a tokenizer.json or a folder with GPT-2's files
        "end_of_document": True,  # put the tokenizer's end token after every document
        "layout": "blocks",  # packed, padded, blocks, streams, or rows that were prepared
        "length": 256,  # tokens per row
        "random_offset": False,  # blocks begin at another offset in every epoch
        "long_documents": "error",  # packed, padded: longer than a row: error or split
        "seed": 0,  # of the order
    }


def _masked_text() -> dict:
    return {
        **_text(),
        "layout": "padded",  # padded or blocks: one document, or piece of text, per row
        "mask_rate": 0.15,  # of the tokens, to be predicted
    }


def _images() -> dict:
    return {
        "source": "embedded",  # embedded (8 x 8 digits), moving_digits, files or tfds
        "path": "",  # files: a folder or zip of class folders, or an array file
        "eval_path": "",  # files: evaluation images; empty = hold some of path out
        "labels_path": "",  # files: labels of an .npy or idx file
        "eval_labels_path": "",
        "name": "",  # tfds: the dataset
        "data_dir": "",  # tfds: where it is prepared; empty = TFDS's own default
        "split": "train",  # tfds
        "eval_split": "",  # tfds: empty = hold some of split out
        "image_key": "image",  # tfds: the feature; .npz: the array
        "label_key": "label",  # likewise; empty = no classes
        "eval_fraction": 0.1,  # held out, if nothing else is given
        "channels": 3,  # 1 or 3
        "image_size": 0,  # resize and crop to a square; 0 = as they are
        "in_memory": True,  # decode once; false = decode when needed, tfds only
        "threads": 1,  # batches made at the same time
        "flip": False,  # mirror half of the training images
        "crop_padding": 0,  # pad and crop at random; 0 = none
        "resized_crop": 0.0,  # smallest area of the random resized crop; 0 = none
        "rand_augment": 0,  # operations per image; 0 = none
        "magnitude": 9.0,  # of rand_augment, 0 to 10
        "erasing": 0.0,  # probability
        "mixup": 0.0,  # alpha; 0 = none
        "cutmix": 0.0,  # alpha; 0 = none
        "label_smoothing": 0.0,
        "dequantise": False,  # uniform noise within a grey level
        "seed": 0,  # of the order and the augmentation
    }


def _mlp() -> dict:
    return {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}


def _convnet() -> dict:
    return {
        "stages": (32, 64),  # channels; the image is halved between stages
        "convs_per_stage": 2,
        "norm_groups": 8,  # of GroupNorm; 0 = no norm
        "feature_size": 128,  # in front of the head
    }


def _velocity_mlp() -> dict:
    return {
        "hidden_size": 100,
        "num_hidden_layers": 2,
        "dtype": "float32",
        "param_dtype": "float32",
    }


def _unet() -> dict:
    return {
        "image_size": 32,
        "channels": 3,
        "model_channels": 96,
        "channel_mult": (1, 2, 2),  # width of each level
        "num_blocks": 2,  # residual blocks of a level
        "attn_resolutions": (16,),
        "dropout": 0.15,
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": False,
    }


def _ncsnpp() -> dict:
    return {
        **_unet(),
        "embedding_type": "positional",  # of the time: positional or fourier
        "fourier_scale": 16.0,
        "fir": False,  # halve and double with fir_kernel
        "fir_kernel": (1.0, 3.0, 3.0, 1.0),
        "progressive": "none",  # or output_skip
        "progressive_input": "none",  # or input_skip, residual
        "skip_rescale": True,
        "scale_by_sigma": False,
        "init_scale": 0.0,
    }


def _edm() -> dict:
    return {
        **_unet(),
        "parameterisation": "velocity",  # of the output: velocity, or edm's denoiser
        "sigma_data": 0.5,
        "num_classes": 0,  # of the condition; 0 = none
        "augment_dim": 0,
        "channel_mult_emb": 4,
    }


def _edm_songunet() -> dict:
    return {
        **_edm(),
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",  # or residual
        "resample_filter": (1.0, 1.0),
    }


def _dit() -> dict:
    return {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_heads": 4,
        "patch_size": (2, 2),
        "num_classes": 0,  # of the condition; 0 = none
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": False,
    }


def _lightnet_dit() -> dict:
    return {
        **_lightnet(),
        "patch_size": (2, 2),
        "num_classes": 0,  # of the condition; 0 = none
        "learn_sigma": False,
    }


def _flow_images() -> dict:
    return {
        **_images(),
        "start_path": "",  # files: images that the flow starts from; empty = noise
        "pairs": "",  # a folder of scanax.train.generate_pairs; empty = independent ends
        "teacher": "",  # of the pairs; empty = init_from
    }


def _mixtures() -> dict:
    return {
        "distance": 10.0,  # of the components from the middle
        "variance": 0.3,
        "pairs": "",  # a folder of scanax.train.generate_pairs; empty = independent ends
        "teacher": "",  # of the pairs; empty = init_from
        "in_memory": True,  # the pairs
        "eval_fraction": 0.1,  # of the pairs, held out
        "seed": 0,  # of the points
    }


def _flow_objective() -> dict:
    return {
        "loss": "l2",  # l2, root_l2, l1, huber, lpips_huber, ...: models/rectified_flow/losses.py
        "times": "uniform",  # u_shaped, logit_normal:0:1, t0, k_step:4, ...: .../times.py
        "eps": 0.0,  # cut-off of the times; 0 = the published one
        "weight": "uniform",  # of the loss over time: .../losses.py
        "huber_c": "d",  # 0.00054 d; or sqrt_d, or a number
        "distance": "",  # for losses with lpips: random_conv, lpips:FILE or piq:FILE
        "distance_size": "",  # resize images for it: 64 (SlimFlow) or 224 (2-RF++)
        "annealing": "none",  # fresh noise in pairs: linear:STEPS, exp:STEPS, cos:STEPS, fixed:B
        "flip": "none",  # mirror pairs as one: example, or batch
        "teacher": "",  # a flow's folder, for one of the next two
        "online_steps": 0,  # reflow without stored pairs: Euler steps of the teacher
        "guidance": 0.0,  # weight of flow-guided distillation
    }


def _flow_sampler() -> dict:
    return {
        "recipe": "rf_euler:100",  # models/rectified_flow/recipes.py
        "label": -1,  # class of all samples; -1 = all in turn
        "invert": "rf_invert_euler:100",  # the way back to noise
        "features": "classifier",  # of the analysis quality; or classifier:DIR, pixels, pca:D, ...
        "recipes": ("rf_euler:1", "rf_euler:2", "rf_euler:4", "rf_euler:16", "rf_rk45"),  # likewise
    }


def _masked_objective() -> dict:
    return {
        "loss": "lambda_dce",  # t_dse, t_dce, lambda_dce, k_dce, nelbo: models/radd/losses.py
        "schedule": "log_linear",  # geometric, linear, cosine, ...: models/radd/schedules.py
        "times": "",  # of a batch: iid, vdm or decoupled; empty = the loss's published way
        "eval_draws": 16,  # sets of masks per row of an evaluation
    }


def _masked_sampler() -> dict:
    return {
        "order": "diffusion",  # forward, backward, random, first_hitting, confidence, entropy
        "steps": 256,  # of the diffusion
        "method": "tweedie",  # of its steps: tweedie or euler
        "grid": "even",  # of its times: even, uniform or cosine
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "slots": 16,  # rows that are computed at once
        "block": 64,  # new tokens of every window beyond the context
        "likelihood_draws": 1024,  # of the analysis likelihood, per row
        "scorer": "",  # a causal language model's run, for the analysis generative_perplexity
    }


_CAUSAL = {"delta_product": _delta_product, "lightnet": lambda: _lightnet_lm(causal=True)}
_MODEL = {
    "word_problem": _CAUSAL,
    "formal_language": _CAUSAL,
    "language_model": {**_CAUSAL, "rmoe": _rmoe, "rmoe_seq": _rmoe_seq},
    "masked_language_model": {"lightnet": lambda: _lightnet_lm(causal=False)},
    "masked_diffusion": {"radd": _radd, "lightnet": lambda: _lightnet_lm(causal=False)},
    "image_classification": {"mlp": _mlp, "lightnet": _lightnet_grid, "convnet": _convnet},
    "rectified_flow": {
        "ncsnpp": _ncsnpp,
        "edm_songunet": _edm_songunet,
        "edm_dhariwal": _edm,
        "dit": _dit,
        "lightnet": _lightnet_dit,
    },
    "rectified_flow_2d": {"mlp": _velocity_mlp},
}
_DATA = {
    "word_problem": _word_problem,
    "formal_language": _formal_language,
    "language_model": _text,
    "masked_language_model": _masked_text,
    "masked_diffusion": _text,
    "image_classification": _images,
    "rectified_flow": _flow_images,
    "rectified_flow_2d": _mixtures,
}
_OBJECTIVE = {
    "masked_diffusion": _masked_objective,
    "rectified_flow": _flow_objective,
    "rectified_flow_2d": _flow_objective,
}
_SAMPLER = {
    "masked_diffusion": _masked_sampler,
    "rectified_flow": _flow_sampler,
    "rectified_flow_2d": _flow_sampler,
}
