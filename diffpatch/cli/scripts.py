"""What scripts of your own may use of the command line: its options, and what becomes of them.

    parser = scripts.Parser(description=__doc__)
    scripts.add_model_options(parser)
    scripts.add_generation_options(parser)
    args = parser.parse_args()
    source = loading.find(args.model)
    call = scripts.call_arguments(args, source)
    pipe = scripts.load(source, scripts.load_options(args))

Other names of `diffpatch.cli` may change from version to version.
"""

from diffpatch.cli.errors import UsageError
from diffpatch.cli.eval.table import describe as scores_table
from diffpatch.cli.eval.vbench import describe as vbench_table
from diffpatch.cli.generation import call_arguments, load, load_options
from diffpatch.cli.options.arguments import add_generation_options, add_model_options, number
from diffpatch.cli.output import keep_settings, write_text
from diffpatch.cli.parameters import method_parameters
from diffpatch.cli.parser import Parser
from diffpatch.cli.progress import hush_libraries, say
from diffpatch.cli.render.sheets import check_format

__all__ = [
    "Parser",
    "UsageError",
    "add_generation_options",
    "add_model_options",
    "call_arguments",
    "check_format",
    "hush_libraries",
    "keep_settings",
    "load",
    "load_options",
    "method_parameters",
    "number",
    "say",
    "scores_table",
    "vbench_table",
    "write_text",
]
