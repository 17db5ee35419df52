"""Every key, with the values that all other configs start from: a 124M TokenFormer as in the paper's ladder.

Trains on: the interpreter's standard library, the embedded data set. Name another in `data`.
This file is the list of keys; it is no recipe of its own and promises no number.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "language"  # what the model learns: to predict each next token of a text; or "image_classification"
    config.seed = 0
    config.steps = 1000  # the run ends at this step, counted from the model's birth
    config.train_tokens = 0.0  # in place of steps: the run ends once it has seen so many, since its birth; 0: steps
    config.train_flops = 0.0  # in place of steps: model FLOPs, as `report` counts them, smaller rungs' too; 0: steps
    config.train_epochs = 0.0  # in place of steps: as often each of data.train_examples; 0: steps
    config.max_minutes = 0.0  # after which training is saved and stops, as by a signal (exit code 85); 0: never
    config.batch_size = 32  # sequences a step, over all devices
    config.accumulation = 1  # the batch is worked through in this many parts
    config.log_every = 10  # steps; loss, speed and learning rate
    config.eval_every = 100  # steps; 0 evaluates at the end only
    config.eval_batches = 0  # batches of the validation split an evaluation reads; 0 reads all
    config.checkpoint_every = 200  # steps; 0 saves at the end only (and on a signal to stop)
    config.checkpoints_kept = 2
    config.non_finite = "raise"  # a step whose loss or gradient is not finite never learns; then "raise", "skip" its
    # batch, or "rollback" to the last checkpoint and skip the batches since
    config.non_finite_limit = 10  # steps skipped in a row, or rollbacks, after which the run ends all the same
    config.loss_spike = 0.0  # nats above the mean of 20 steps at which a loss counts as not finite, too; 0: none does
    config.track = "none"  # or "wandb": metrics and growths to Weights & Biases, too (the extra `wandb`)
    config.profile_at = 0  # step whose next 5 steps are written as a profile to WORKDIR/tensorboard; 0: none

    config.rungs = ()  # growths on the way: (dict(step=1000, model=dict(ffn_tokens=4096)), …); see configs/ladder.py

    config.model = model = ConfigDict()
    model.projection = "pattention"  # or "linear": a plain Transformer in the same block
    model.normalizer = "l2_norm_gelu"  # or "gelu_l2_norm", "softmax"
    model.gelu = "erf"  # exact, as in the authors' PyTorch code, or "tanh", the approximation of their TPU code
    model.tau_tokens = 0  # tau is sqrt(this) in the attention and sqrt(4 * this) in the ffn; 0: sqrt(own tokens)
    model.vocab_size = 8192  # rows of the embedding; at least the tokenizer's size
    model.context_length = 1024
    model.num_layers = 12
    model.num_heads = 12
    model.embed_dim = 768
    model.qkv_tokens = 576  # parameter tokens of the query, of the key and of the value projection, each
    model.out_tokens = 576  # parameter tokens of the attention's output projection
    model.ffn_tokens = 2304  # parameter tokens of the feed-forward; the hidden width of a "linear" one
    model.pad_tokens_to = 0  # counts are rounded up to a multiple with tokens that add nothing until they learn; 0: not
    model.nested = ()  # or (0.25, 0.5, 1.0): these first parts of the tokens learn to be models, too
    model.rotary_fraction = 0.25  # part of each head's dims that rotary turns
    model.dropout = 0.0  # in training: rate on embedding, attention's output, ffn weights, final norm
    model.stochastic_depth = 0.0  # in training: rate at which an example skips an attention or ffn, in every layer
    model.stochastic_depth_rises = False  # True: that rate is the last layer's, and rises to it from 0 in the first
    model.image_size = 0  # pixels of an image's side; 0: the model reads text. Images: vocab_size, context_length = 0
    model.patch_size = 0  # pixels of a patch's side
    model.image_channels = 0  # 3, or 1 for gray images
    model.num_classes = 0
    model.pooling = "class_token"  # whose last state is classified; or "mean": that of all patches
    model.dtype = "float32"  # of the computation, or "bfloat16"; parameters are always float32
    model.remat = "none"  # or keep only "dots" (contractions' results), "projections" (theirs), "full" (layers' inputs)

    config.data = data = ConfigDict()
    data.dataset = "python_source"  # or "text_files", or any tfds text set: "lm1b", "c4/en", "wiki40b/en"
    data.path = ""  # text_files: a folder, file, glob or URL of .txt, .jsonl, .parquet; tfds sets: their data_dir
    data.text_key = "text"  # the feature, .jsonl key or .parquet column that holds the text
    data.sources = ()  # a mixture: (dict(name="web", weight=0.7, path="…"), dict(name="code", weight=0.3, path="…"))
    # whose other keys are as in data: dataset, path, text_key, train_split, validation_split
    data.train_examples = 0  # in an epoch, for train_epochs; images: checked against the data
    data.train_split = "train"  # or a part of it, "train[:10%]"; image_folder: the name of a folder in data.path
    data.validation_split = "validation"
    data.tokenizer = ""  # a tokenizer.json; empty trains a byte-level BPE of model.vocab_size on the train split
    data.mask_documents = False  # True: attention stays within a document (the authors' does not)
    data.cache_dir = "~/.cache/tokenformer_jax"  # prepared data sets, tokenizers and tokens; may be gs://BUCKET/FOLDER

    config.optimizer = optimizer = ConfigDict()
    optimizer.peak_learning_rate = 6e-4
    optimizer.final_learning_rate = 6e-5  # reached at the last step, by "cosine" and "wsd"
    optimizer.warmup_steps = 10  # linear from 0
    optimizer.schedule = "cosine"  # from the peak on; or "wsd": the peak, then a decay at the end; or "constant"
    optimizer.decay_fraction = 0.2  # wsd: part of the schedule, at its end, in which the rate decays
    optimizer.decay = "linear"  # wsd; or "sqrt": it falls as 1 - sqrt(part of the decay that is done)
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.epsilon = 1e-8
    optimizer.weight_decay = 0.1  # on the embedding and all projections, not on the final norm
    optimizer.clip_norm = 1.0  # of the whole gradient
    optimizer.average = (
        0.0  # share that an exponential mean of the weights keeps at a step; evaluation uses it; 0: none
    )

    config.augment = augment = ConfigDict()  # of images, in training
    augment.smallest_crop = 0.0  # crops of this part of an image's area or more, resized; 0: its center
    augment.center = 1.0  # part of an image's shorter side that is seen of it otherwise, in evaluation too
    augment.flip = False  # left and right, at random
    augment.rand_augment_layers = 0  # operations of RandAugment; 0: none
    augment.rand_augment_magnitude = 9.0  # of 10, and its standard deviation
    augment.rand_augment_deviation = 0.5
    augment.erasing = 0.0  # probability that a rectangle is replaced by noise
    augment.mixup = 0.0  # alpha of Mixup, and of CutMix; each pair of images has one of them; 0: not
    augment.cutmix = 0.0
    augment.label_smoothing = 0.0

    config.grow = grow = ConfigDict()
    grow.recipe = "zero_keys"  # or "isometric", "split", both lossless too; "random_keys", "released", "zero_padding"
    grow.tau_ramp = 0.25  # zero_keys: part of the steps after growth in which tau goes to sqrt(tokens); 0 keeps it
    grow.restart_schedule = True  # the learning rate warms up and decays anew over the steps after growth; False: one
    # schedule goes on over all rungs up to the last step, each at its own peak (use optimizer.schedule = "wsd")
    grow.train = "all"  # or "new": the new tokens learn, and nothing else ever does: an adapter; docs/adapters.md
    grow.new_tokens_rate = 1.0  # factor of the learning rate for new tokens
    grow.new_tokens_warmup = 0  # steps after growth in which that factor rises from 0
    grow.freeze_steps = 0  # steps after growth in which only the new tokens learn in projections that grew
    grow.patience = 0  # evaluations without improvement after which the next rung begins early; 0: never early
    grow.min_improvement = 0.01  # nats by which a validation loss must beat the best one to count as improvement
    grow.slope = (
        0.0  # the next rung begins early once twice the FLOPs have brought fewer nats than this; 0: never early
    )

    config.mesh = mesh = ConfigDict()
    mesh.slice = 1  # slices of the pod, or other groups of devices behind a slower network; as mesh.data otherwise
    mesh.data = 1  # devices that hold other examples and the same parameters
    mesh.fsdp = 1  # devices that hold other examples and share the storage of every parameter
    mesh.tensor = 1  # devices that share parameter tokens, heads and vocabulary
    return config
