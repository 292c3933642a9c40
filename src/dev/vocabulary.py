"""The words of the demo data: tasks, families of models, licences, languages, names of owners."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    purpose: str  # what comes after "for" in a sentence
    topics: tuple[str, ...]  # tags
    fields: tuple[str, ...]  # what a fine-tuned model is about: part of its name


@dataclass(frozen=True, slots=True)
class Family:
    """Models with the same base: their names begin with its name."""

    name: str
    architecture: str
    library: str
    tasks: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]  # label in the name, number of parameters
    variants: tuple[str, ...]
    license: str
    context_length: int | None = None


TASKS: Final = {
    task.name: task
    for task in (
        Task(
            "text-generation",
            "open-ended text generation",
            ("conversational", "text-generation-inference", "chat", "function-calling", "roleplay"),
            ("code", "math", "medical", "legal", "finance", "storywriter", "sql", "tools"),
        ),
        Task(
            "text-classification",
            "text classification",
            ("sentiment", "moderation", "intent-detection", "multi-label"),
            ("sst2", "toxicity", "emotion", "news", "spam", "reviews", "intent"),
        ),
        Task(
            "token-classification",
            "named entity recognition",
            ("ner", "pos-tagging", "biomedical", "pii"),
            ("ner", "conll03", "pii", "pos", "chemistry", "clinical"),
        ),
        Task(
            "sentence-similarity",
            "sentence similarity and semantic search",
            ("sentence-transformers", "feature-extraction", "retrieval", "mteb"),
            ("retrieval", "nli", "support", "patents", "multilingual"),
        ),
        Task(
            "feature-extraction",
            "feature extraction",
            ("embeddings", "mteb", "retrieval"),
            ("embed", "code-search", "biomed", "ecommerce"),
        ),
        Task(
            "fill-mask",
            "masked language modelling",
            ("pretraining", "masked-lm"),
            ("legal", "scientific", "tweets", "clinical"),
        ),
        Task(
            "summarization",
            "summarization",
            ("abstractive", "long-document"),
            ("cnn", "xsum", "meetings", "arxiv", "billsum"),
        ),
        Task(
            "translation",
            "translation",
            ("machine-translation", "multilingual"),
            ("en-de", "en-fr", "en-es", "en-ja", "de-en", "zh-en", "en-hi"),
        ),
        Task(
            "question-answering",
            "extractive question answering",
            ("squad", "reading-comprehension"),
            ("squad2", "covid", "manuals", "tydi"),
        ),
        Task(
            "zero-shot-classification",
            "zero-shot classification",
            ("nli", "entailment"),
            ("mnli", "xnli", "anli"),
        ),
        Task(
            "text-to-image",
            "text-to-image generation",
            ("diffusion", "stable-diffusion", "lora", "art"),
            ("anime", "photoreal", "pixel-art", "watercolor", "logos", "interiors"),
        ),
        Task(
            "image-classification",
            "image classification",
            ("vision", "imagenet"),
            ("food101", "plants", "xray", "cars", "satellite", "waste"),
        ),
        Task(
            "object-detection",
            "object detection",
            ("vision", "coco"),
            ("traffic", "helmets", "documents", "retail", "drones"),
        ),
        Task(
            "image-segmentation",
            "image segmentation",
            ("vision", "ade20k", "semantic-segmentation"),
            ("cityscapes", "clothes", "roads", "cells"),
        ),
        Task(
            "image-to-text",
            "image captioning",
            ("vision", "captioning", "ocr"),
            ("captions", "receipts", "handwriting", "charts"),
        ),
        Task(
            "image-text-to-text",
            "conversations about images",
            ("multimodal", "vision", "conversational"),
            ("docvqa", "medical", "gui", "charts"),
        ),
        Task(
            "automatic-speech-recognition",
            "speech recognition",
            ("audio", "speech", "asr"),
            ("common-voice", "calls", "medical", "de", "hi", "sw"),
        ),
        Task(
            "text-to-speech",
            "speech synthesis",
            ("audio", "speech", "tts"),
            ("ljspeech", "audiobook", "vctk", "es"),
        ),
        Task(
            "audio-classification",
            "audio classification",
            ("audio", "keyword-spotting"),
            ("keywords", "birds", "music-genres", "emotion"),
        ),
        Task(
            "reinforcement-learning",
            "reinforcement learning",
            ("deep-reinforcement-learning", "gymnasium"),
            ("lunarlander", "cartpole", "mujoco", "atari"),
        ),
        Task(
            "tabular-classification",
            "classification of tables",
            ("tabular", "baseline"),
            ("churn", "credit", "fraud", "titanic"),
        ),
        Task(
            "time-series-forecasting",
            "forecasting",
            ("time-series", "zero-shot-forecasting"),
            ("energy", "demand", "traffic", "weather"),
        ),
    )
}

M, B = 10**6, 10**9
CHAT: Final = ("Instruct", "Chat", "base", "Instruct-GGUF", "AWQ", "GPTQ", "DPO", "it", "LoRA")
TUNED: Final = ("finetuned", "lora", "distilled", "v2", "onnx", "int8", "large-batch")
ENCODER: Final = ("uncased", "cased", "multilingual", "finetuned", "distilled", "onnx")
VISION: Final = ("224", "384", "in21k", "finetuned", "onnx", "fp16")

# The more often used ones first: they are drawn with falling weights.
FAMILIES: Final = (
    Family(
        "Llama-3.1",
        "LlamaForCausalLM",
        "transformers",
        ("text-generation",),
        (("8B", 8 * B), ("70B", 70 * B), ("405B", 405 * B)),
        CHAT,
        "llama3.1",
        131_072,
    ),
    Family(
        "Qwen2.5",
        "Qwen2ForCausalLM",
        "transformers",
        ("text-generation",),
        (
            ("0.5B", 494 * M),
            ("1.5B", 1_544 * M),
            ("3B", 3_086 * M),
            ("7B", 7_616 * M),
            ("14B", 14_770 * M),
            ("32B", 32_764 * M),
            ("72B", 72_706 * M),
        ),
        CHAT,
        "apache-2.0",
        32_768,
    ),
    Family(
        "bert",
        "BertForMaskedLM",
        "transformers",
        (
            "text-classification",
            "token-classification",
            "fill-mask",
            "question-answering",
            "feature-extraction",
        ),
        (("tiny", 4 * M), ("base", 110 * M), ("large", 336 * M)),
        ENCODER,
        "apache-2.0",
        512,
    ),
    Family(
        "Mistral",
        "MistralForCausalLM",
        "transformers",
        ("text-generation",),
        (("7B", 7_248 * M), ("Nemo-12B", 12_248 * M), ("Small-24B", 23_572 * M)),
        CHAT,
        "apache-2.0",
        32_768,
    ),
    Family(
        "stable-diffusion-xl",
        "UNet2DConditionModel",
        "diffusers",
        ("text-to-image",),
        (("base", 3_470 * M), ("turbo", 3_470 * M)),
        ("lora", "lightning", "inpainting", "fp16", "controlnet"),
        "openrail++",
    ),
    Family(
        "MiniLM",
        "BertModel",
        "sentence-transformers",
        ("sentence-similarity", "feature-extraction"),
        (("L3", 17 * M), ("L6", 23 * M), ("L12", 33 * M)),
        ("v1", "v2", "multilingual", "onnx", "finetuned"),
        "apache-2.0",
        512,
    ),
    Family(
        "whisper",
        "WhisperForConditionalGeneration",
        "transformers",
        ("automatic-speech-recognition",),
        (
            ("tiny", 39 * M),
            ("base", 74 * M),
            ("small", 244 * M),
            ("medium", 769 * M),
            ("large-v3", 1_550 * M),
        ),
        ("finetuned", "en", "ct2", "turbo", "int8", "lora"),
        "apache-2.0",
        448,
    ),
    Family(
        "gemma-2",
        "Gemma2ForCausalLM",
        "transformers",
        ("text-generation",),
        (("2b", 2_614 * M), ("9b", 9_242 * M), ("27b", 27_227 * M)),
        ("it", "base", "it-GGUF", "lora", "AWQ"),
        "gemma",
        8_192,
    ),
    Family(
        "roberta",
        "RobertaForSequenceClassification",
        "transformers",
        ("text-classification", "token-classification", "zero-shot-classification", "fill-mask"),
        (("base", 125 * M), ("large", 355 * M)),
        TUNED,
        "mit",
        512,
    ),
    Family(
        "distilbert",
        "DistilBertForSequenceClassification",
        "transformers",
        ("text-classification", "question-answering", "token-classification"),
        (("base", 66 * M),),
        ENCODER,
        "apache-2.0",
        512,
    ),
    Family(
        "vit",
        "ViTForImageClassification",
        "transformers",
        ("image-classification",),
        (("tiny", 6 * M), ("base", 86 * M), ("large", 304 * M)),
        VISION,
        "apache-2.0",
    ),
    Family(
        "t5",
        "T5ForConditionalGeneration",
        "transformers",
        ("summarization", "translation", "question-answering"),
        (("small", 60 * M), ("base", 223 * M), ("large", 738 * M), ("3b", 2_850 * M)),
        TUNED,
        "apache-2.0",
        512,
    ),
    Family(
        "Phi-3.5",
        "Phi3ForCausalLM",
        "transformers",
        ("text-generation",),
        (("mini", 3_821 * M), ("medium", 13_960 * M)),
        CHAT,
        "mit",
        131_072,
    ),
    Family(
        "FLUX.1",
        "FluxTransformer2DModel",
        "diffusers",
        ("text-to-image",),
        (("schnell", 11_902 * M), ("dev", 11_902 * M)),
        ("lora", "fp8", "GGUF", "fill", "depth"),
        "other",
    ),
    Family(
        "bge",
        "XLMRobertaModel",
        "sentence-transformers",
        ("sentence-similarity", "feature-extraction"),
        (("small", 33 * M), ("base", 109 * M), ("large", 335 * M), ("m3", 568 * M)),
        ("en-v1.5", "zh-v1.5", "reranker", "onnx", "finetuned"),
        "mit",
        8_192,
    ),
    Family(
        "wav2vec2",
        "Wav2Vec2ForCTC",
        "transformers",
        ("automatic-speech-recognition", "audio-classification"),
        (("base", 95 * M), ("large", 317 * M), ("xls-r-300m", 317 * M)),
        ("960h", "53", "finetuned", "lv60"),
        "apache-2.0",
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "transformers",
        ("text-generation",),
        (("small", 124 * M), ("medium", 355 * M), ("large", 774 * M), ("xl", 1_558 * M)),
        ("finetuned", "distilled", "v2", "onnx"),
        "mit",
        1_024,
    ),
    Family(
        "yolo11",
        "YOLO",
        "ultralytics",
        ("object-detection", "image-segmentation"),
        (("n", 3 * M), ("s", 9 * M), ("m", 20 * M), ("x", 57 * M)),
        ("onnx", "coco", "finetuned", "seg", "tensorrt"),
        "agpl-3.0",
    ),
    Family(
        "deberta-v3",
        "DebertaV2ForSequenceClassification",
        "transformers",
        ("zero-shot-classification", "text-classification", "token-classification"),
        (("xsmall", 71 * M), ("small", 142 * M), ("base", 184 * M), ("large", 435 * M)),
        TUNED,
        "mit",
        512,
    ),
    Family(
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        "transformers",
        ("image-text-to-text",),
        (("2B", 2_209 * M), ("7B", 8_291 * M), ("72B", 73_406 * M)),
        ("Instruct", "AWQ", "GPTQ-Int4", "LoRA"),
        "apache-2.0",
        32_768,
    ),
    Family(
        "opus-mt",
        "MarianMTModel",
        "transformers",
        ("translation",),
        (("tiny", 17 * M), ("base", 77 * M), ("big", 240 * M)),
        ("ct2", "onnx", "v2", "finetuned"),
        "cc-by-4.0",
        512,
    ),
    Family(
        "convnext",
        "ConvNextForImageClassification",
        "timm",
        ("image-classification", "image-segmentation"),
        (("nano", 16 * M), ("tiny", 29 * M), ("base", 89 * M), ("large", 198 * M)),
        VISION,
        "apache-2.0",
    ),
    Family(
        "DeepSeek-R1-Distill",
        "Qwen2ForCausalLM",
        "transformers",
        ("text-generation",),
        (("1.5B", 1_777 * M), ("7B", 7_616 * M), ("32B", 32_764 * M)),
        ("GGUF", "AWQ", "LoRA", "Reasoning", "it"),
        "mit",
        131_072,
    ),
    Family(
        "resnet",
        "ResNetForImageClassification",
        "timm",
        ("image-classification",),
        (("18", 12 * M), ("50", 26 * M), ("101", 45 * M), ("152", 60 * M)),
        VISION,
        "apache-2.0",
    ),
    Family(
        "clip-vit",
        "CLIPModel",
        "open_clip",
        ("zero-shot-classification", "feature-extraction"),
        (("base-patch32", 151 * M), ("large-patch14", 428 * M)),
        ("laion2b", "openai", "multilingual", "onnx"),
        "mit",
        77,
    ),
    Family(
        "blip",
        "BlipForConditionalGeneration",
        "transformers",
        ("image-to-text",),
        (("base", 247 * M), ("large", 470 * M)),
        TUNED,
        "bsd-3-clause",
    ),
    Family(
        "trocr",
        "VisionEncoderDecoderModel",
        "transformers",
        ("image-to-text",),
        (("small", 62 * M), ("base", 334 * M), ("large", 558 * M)),
        ("printed", "handwritten", "finetuned"),
        "mit",
    ),
    Family(
        "detr",
        "DetrForObjectDetection",
        "transformers",
        ("object-detection",),
        (("resnet-50", 42 * M), ("resnet-101", 61 * M)),
        ("dc5", "panoptic", "finetuned"),
        "apache-2.0",
    ),
    Family(
        "segformer",
        "SegformerForSemanticSegmentation",
        "transformers",
        ("image-segmentation",),
        (("b0", 4 * M), ("b2", 27 * M), ("b5", 85 * M)),
        ("512", "1024", "finetuned"),
        "other",
    ),
    Family(
        "bart",
        "BartForConditionalGeneration",
        "transformers",
        ("summarization", "zero-shot-classification"),
        (("base", 139 * M), ("large", 406 * M)),
        TUNED,
        "mit",
        1_024,
    ),
    Family(
        "VITS",
        "VitsModel",
        "transformers",
        ("text-to-speech",),
        (("small", 18 * M), ("base", 36 * M)),
        ("v2", "finetuned", "onnx"),
        "cc-by-nc-4.0",
    ),
    Family(
        "ppo",
        "ActorCriticPolicy",
        "stable-baselines3",
        ("reinforcement-learning",),
        (("mlp", 10_000), ("cnn", 1_686_000)),
        ("v2", "v3", "tuned"),
        "mit",
    ),
    Family(
        "xgboost",
        "XGBClassifier",
        "xgboost",
        ("tabular-classification",),
        (("small", 50_000), ("large", 900_000)),
        ("v2", "tuned", "calibrated"),
        "apache-2.0",
    ),
    Family(
        "chronos",
        "T5ForConditionalGeneration",
        "chronos-forecasting",
        ("time-series-forecasting",),
        (("tiny", 8 * M), ("small", 46 * M), ("base", 201 * M), ("large", 709 * M)),
        ("bolt", "finetuned", "v2"),
        "apache-2.0",
        512,
    ),
)

# Where a model does not carry the licence of its base; None: not told.
LICENSES: Final = (
    "apache-2.0",
    "mit",
    None,
    "cc-by-nc-4.0",
    "other",
    "cc-by-4.0",
    "openrail",
    "cc-by-sa-4.0",
    "gpl-3.0",
    "bsd-3-clause",
    "cc0-1.0",
)
# By ISO 639-1, the more often used ones first.
LANGUAGES: Final = (
    *("en", "zh", "de", "fr", "es", "ja", "ko", "ru", "pt", "it", "ar", "hi", "tr", "nl", "pl"),
    *("vi", "id", "sv", "cs", "uk", "fa", "ro", "fi", "da", "he", "sw", "bn", "ta", "th", "el"),
)
# Of the most used ones; English is not worth a mention.
LANGUAGE_NAMES: Final = {
    "zh": "Chinese",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "ja": "Japanese",
    "ko": "Korean",
    "ru": "Russian",
    "pt": "Portuguese",
    "it": "Italian",
    "ar": "Arabic",
    "hi": "Hindi",
    "tr": "Turkish",
    "nl": "Dutch",
    "pl": "Polish",
}
# Languages have no part in these tasks.
WORDLESS: Final = frozenset(
    {
        "image-classification",
        "object-detection",
        "image-segmentation",
        "audio-classification",
        "reinforcement-learning",
        "tabular-classification",
        "time-series-forecasting",
    }
)
QUANTIZATIONS: Final = ("Q4_K_M", "Q8_0", "Q5_K_M", "Q6_K", "Q3_K_S", "Q2_K", "IQ4_XS", "F16")

ORGANIZATION_FIRST: Final = (
    *("Northwind", "Lumen", "Aurora", "Harbor", "Cobalt", "Juniper", "Meridian", "Quartz"),
    *("Solstice", "Tidal", "Vertex", "Willow", "Zephyr", "Basalt", "Cinder", "Delta", "Ember"),
    *("Fjord", "Granite", "Helix", "Indigo", "Krypton", "Lattice", "Monsoon", "Nimbus", "Onyx"),
    *("Pioneer", "Quill", "Raven", "Sable", "Tundra", "Umbra", "Vista", "Wren", "Yarrow"),
    *("Anchor", "Beacon", "Cedar", "Drift", "Echo"),
)
ORGANIZATION_SECOND: Final = (
    *("AI", "Labs", "Research", "Intelligence", "Vision", "Speech", "Robotics", "Health"),
    *("Analytics", "Systems", "NLP", "University", "Institute", "Foundation", "Studio", "Data"),
    *("Compute", "Learning", "Models", "Collective"),
)
FIRST_NAMES: Final = (
    *("Mara", "Jonas", "Aiko", "Priya", "Mateo", "Lucia", "Omar", "Ingrid", "Chen", "Amara"),
    *("Noah", "Sofia", "Elif", "Kofi", "Hana", "Diego", "Anja", "Ravi", "Yusuf", "Clara"),
    *("Tomas", "Leila", "Viktor", "Nadia", "Samuel", "Mei", "Rafael", "Freya", "Ivan", "Zuri"),
    *("Emil", "Paula", "Kenji", "Farah", "Luca", "Greta", "Arjun", "Olga", "Pablo", "Ruth"),
)
LAST_NAMES: Final = (
    *("Lindqvist", "Tanaka", "Okafor", "Sharma", "Garcia", "Novak", "Haddad", "Weber", "Wei"),
    *("Mensah", "Rossi", "Kaya", "Johansen", "Silva", "Petrov", "Dubois", "Kim", "Nguyen"),
    *("Hansen", "Moreau", "Iyer", "Kowalski", "Ferrari", "Yilmaz", "Brandt", "Costa", "Ahmed"),
    *("Larsen", "Popescu", "Mwangi", "Sato", "Fischer", "Torres", "Jansen", "Virtanen", "Ali"),
    *("Bauer", "Lopez", "Park", "Nakamura"),
)
# Everyone may know these; the examples in the documents use them.
PEOPLE: Final = (
    ("admin", "Ada Admin"),
    ("alice", "Alice Anders"),
    ("bob", "Bob Berger"),
    ("carol", "Carol Castillo"),
)
ORGANIZATIONS: Final = (
    ("sentence-transformers", "Sentence Transformers"),
    ("qwen", "Qwen"),
    ("harbor-labs", "Harbor Labs"),
    ("northwind-ai", "Northwind AI"),
    ("lumen-research", "Lumen Research"),
    ("tidal-speech", "Tidal Speech"),
)
