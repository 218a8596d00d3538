"""What the config files of a denoiser's checkpoint tell, before any weight loads."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from t2i_rl.core.contracts import ImageModel
from t2i_rl.core.errors import UserError
from t2i_rl.core.readers import Reader, Reading
from t2i_rl.models.diffusion.pipelines import INDEX, read_config
from t2i_rl.models.diffusion.schedulers import read_scheduler
from t2i_rl.models.diffusion.soft_tokens import SoftTokens
from t2i_rl.models.diffusion.text_encoders import tokenizers_of


class ConfigFiles(ImageModel):
    """The questions that a checkpoint's config files answer; weights are read by `LatentDiffusion`.

    denoiser_name: the part of the pipeline that denoises.
    encoders: what each of the pipeline's tokenizers is for.
    """

    denoiser_name = "unet"
    encoders: Mapping[str, str] = {"tokenizer": "CLIP"}

    @classmethod
    def text_reader(cls, settings: Mapping[str, Any]) -> Reader:
        """How a config's checkpoint reads prompts.

        Raises:
            UserError: its files can be neither found nor downloaded, or do not fit each other; the
                line names what to do.
        """
        path, revision = settings["path"], settings.get("revision")
        defaults = {name: argument.default for name, argument in signature(cls.__init__).parameters.items()}
        tokenizers = tokenizers_of(path, revision, read_config(path, None, revision, INDEX))
        return cls.reader_of(tokenizers, defaults | dict(settings))

    @classmethod
    def reader_of(cls, tokenizers: Mapping[str, Any], settings: Mapping[str, Any]) -> Reader:
        """How prompts are read with these tokenizers, by name."""
        readings = [cls.reading_of(cls.encoders[name], tokenizer, settings) for name, tokenizer in tokenizers.items()]
        return Reader(cls.__name__, str(settings["path"]), readings)

    @classmethod
    def reading_of(cls, encoder: str, tokenizer: Any, settings: Mapping[str, Any]) -> Reading:
        """How one encoder reads a text.

        As the pipelines have it, CLIP's window is its tokenizer's, any other's is
        `max_sequence_length`.
        """
        limit = tokenizer.model_max_length if encoder == "CLIP" else settings["max_sequence_length"]
        return Reading(encoder, tokenizer, limit)

    @classmethod
    def image_size(cls, settings: Mapping[str, Any]) -> int:
        """The side in pixels of what a config's checkpoint draws.

        Raises:
            UserError: see `check_files`.
        """
        cls.check_files(settings)
        path, revision = settings["path"], settings.get("revision")
        denoiser, vae = (read_config(path, part, revision) for part in (cls.denoiser_name, "vae"))
        stages = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
        return settings.get("size") or denoiser["sample_size"] * 2 ** (len(stages) - 1)

    @classmethod
    def check_files(cls, settings: Mapping[str, Any]) -> None:
        """Refuse a config's checkpoint of another process than this class trains.

        Raises:
            UserError: its scheduler is of another process, its autoencoder's latents are normalised
                channel by channel, or its files can be neither found nor downloaded.
        """
        path, where = settings["path"], {"revision": settings.get("revision")}
        cls.check_scheduler(path, read_scheduler(path, **where), settings)
        vae = settings.get("vae")
        config = read_config(vae) if vae else read_config(path, "vae", **where)
        if config.get("latents_mean") is not None:
            raise UserError(
                f"{vae or path}: this autoencoder's config has latents_mean, a shift of each channel that training and "
                "noise optimisation here do not know; take another model.vae"
            )

    @classmethod
    def check_scheduler(cls, path: str, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Refuse a scheduler's config, as `schedulers.read_scheduler` reads it.

        Raises:
            UserError: it is of another process than this class trains.
        """
        raise NotImplementedError

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Whether `soft_tokens`, if it is given, is a file of this architecture.

        Raises:
            UserError: it is no such file, or was made for another class of denoisers.
        """
        file = settings.get("soft_tokens")
        if not file:
            return
        bank = SoftTokens.load(file)
        denoiser = read_config(settings["path"], cls.denoiser_name, settings.get("revision"))["_class_name"]
        if denoiser != bank.spec.architecture:
            raise UserError(
                f"model.soft_tokens={file} are for {bank.spec.architecture}, not for {denoiser}: take the model that "
                "they were trained on"
            )
