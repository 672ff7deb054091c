"""Compile C# on a machine without a .NET SDK, with Roslyn from npm on PyPI's .NET Core, driven by pythonnet.

    python -m benchmark.studies.csharp ROSLYN OUTPUT.dll exe|library [-r:LIBRARY.dll …] FILE …

Used by elsewhere.py, which puts these packages there. With an SDK it is `dotnet build`.
"""

import json
import sys
from pathlib import Path

USINGS = "\n".join(f"global using System{name};" for name in ("", ".Collections.Generic", ".IO", ".Linq"))


def main() -> None:
    import dotnetcore2
    import pythonnet

    roslyn, output, kind, *arguments = sys.argv[1:]
    root = Path(dotnetcore2.__file__).parent / "bin"
    framework = {"tfm": "netcoreapp3.1", "framework": {"name": "Microsoft.NETCore.App", "version": "3.1.0"}}
    config = Path(output).with_suffix(".runtimeconfig.json")  # the program's own, and the compiler runs with it too
    config.write_text(json.dumps({"runtimeOptions": framework}))
    pythonnet.load("coreclr", runtime_config=str(config), dotnet_root=str(root))
    import clr

    sys.path.append(roslyn)
    clr.AddReference("Microsoft.CodeAnalysis")
    clr.AddReference("Microsoft.CodeAnalysis.CSharp")
    from Microsoft.CodeAnalysis import MetadataReference, SyntaxTree
    from Microsoft.CodeAnalysis.CSharp import CSharpCommandLineParser, CSharpCompilation, CSharpSyntaxTree
    from Microsoft.CodeAnalysis.Text import SourceText
    from System import Array, String
    from System.IO import File, FileMode, FileStream

    [libraries] = root.glob("shared/Microsoft.NETCore.App/*/")
    names = ("System.", "mscorlib", "netstandard", "Microsoft.Win32")
    references = [f"-r:{path}" for path in libraries.glob("*.dll") if path.name.startswith(names)]
    options = ["-noconfig", "-nostdlib+", "-unsafe+", "-optimize+", "-langversion:10", "-nullable:annotations"]
    options += [f"-target:{kind}", f"-out:{output}", *references, *arguments]
    parsed = CSharpCommandLineParser.Default.Parse(Array[String](options), ".", str(libraries))
    sources = [File.ReadAllText(file.Path) for file in parsed.SourceFiles] + [USINGS]  # what an SDK adds by itself
    trees = [CSharpSyntaxTree.ParseText(SourceText.From(source), parsed.ParseOptions) for source in sources]
    found = [MetadataReference.CreateFromFile(reference.Reference) for reference in parsed.MetadataReferences]
    program = CSharpCompilation.Create(Path(output).stem, options=parsed.CompilationOptions)
    program = program.AddSyntaxTrees(Array[SyntaxTree](trees)).AddReferences(Array[MetadataReference](found))
    stream = FileStream(output, FileMode.Create)
    result = program.Emit(stream)
    stream.Close()
    if not result.Success:
        sys.exit("\n".join(str(message) for message in result.Diagnostics if str(message.Severity) in ("Error", "3")))


if __name__ == "__main__":
    main()
