// Classify headlines with the ONNX INT8 artefact, in C#: Microsoft.ML.OnnxRuntime and this file.
//     dotnet run -- ../../quantised-model-optimum "Your headline" …
// Prints one JSON object a headline, as the Node example does, and rechecks if the folder was built with --recheck.
// Tokens are those of tokenizer.json if it is BERT's WordPiece; any other is refused.
using System.Diagnostics;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json;
using System.Text.RegularExpressions;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;
using static System.Globalization.UnicodeCategory;

try { Run(args); return 0; }
catch (Exception error) { Console.Error.WriteLine("classify: " + error.Message.Replace('\n', ' ')); return 2; }

static void Run(string[] arguments)
{
    if (arguments.Length < 2) throw new ArgumentException("usage: dotnet run -- FOLDER HEADLINE …");
    if (arguments.Any(string.IsNullOrWhiteSpace)) throw new ArgumentException("a headline is empty");
    byte[] Bytes(string name) => File.ReadAllBytes(Path.Combine(arguments[0], name));
    JsonElement Read(string name) => JsonDocument.Parse(Bytes(name)).RootElement;
    using var sha256 = SHA256.Create();
    string Digest(string name) => BitConverter.ToString(sha256.ComputeHash(Bytes(name))).Replace("-", "").ToLower();
    var manifest = Read("manifest.json");
    foreach (var file in manifest.GetProperty("files").EnumerateObject())
        if (Digest(file.Name) != file.Value.GetProperty("sha256").GetString())
            throw new InvalidDataException(file.Name + " was edited: run python lab04-optimum.py");
    string[] labels = Read("config.json").GetProperty("id2label").EnumerateObject()
        .OrderBy(label => int.Parse(label.Name)).Select(label => label.Value.GetString()).ToArray();
    var tokeniser = new WordPiece(Read("tokenizer.json"), manifest.GetProperty("tokenizer"));

    // ONNX Runtime does not see what .NET sets in its own copy of the environment. A user's setting wins.
    if (!RuntimeInformation.IsOSPlatform(OSPlatform.Windows)) setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    using var options = new SessionOptions { IntraOpNumThreads = 1 };
    options.AddSessionConfigEntry("mlas.disable_kleidiai", "1"); // its kernels for ARM's SME change labels
    InferenceSession Open(JsonElement name) => new(Path.Combine(arguments[0], name.GetString()), options);
    using var session = Open(manifest.GetProperty("model_file"));
    using var exact = manifest.TryGetProperty("recheck", out var recheck) ? Open(recheck.GetProperty("graph")) : null;
    foreach (string text in arguments.Skip(1))
    {
        long[] ids = tokeniser.Encode(text);
        var clock = Stopwatch.StartNew();
        float[] logits = Logits(session, ids), best = logits.OrderByDescending(logit => logit).ToArray();
        bool rechecked = exact != null && best[0] - best[1] < recheck.GetProperty("threshold").GetDouble();
        if (rechecked) logits = Logits(exact, ids);
        double ms = clock.Elapsed.TotalMilliseconds, sum = logits.Sum(logit => Math.Exp(logit - logits.Max()));
        var probabilities = labels.Zip(logits, (label, logit) => (label, score: Math.Exp(logit - logits.Max()) / sum))
            .ToDictionary(pair => pair.label, pair => pair.score);
        int id = Array.IndexOf(logits, logits.Max());
        var answer = new { text, tokens = ids.Length, label = labels[id], id, probabilities, ms, rechecked };
        Console.WriteLine(JsonSerializer.Serialize(answer));
    }
}

static float[] Logits(InferenceSession session, long[] ids) // one headline, unpadded, one segment
{
    long[] Fill(long value) => ids.Select(_ => value).ToArray();
    long[] Values(string name) => name == "input_ids" ? ids : Fill(name == "attention_mask" ? 1 : 0);
    using var outputs = session.Run(session.InputMetadata.Keys.Select(name =>
        NamedOnnxValue.CreateFromTensor(name, new DenseTensor<long>(Values(name), new[] { 1, ids.Length }))).ToList());
    return outputs.First().AsEnumerable<float>().ToArray();
}

[DllImport("libc")] static extern int setenv(string name, string value, int overwrite);

class WordPiece // with the settings of a tokenizer.json and of a manifest
{
    readonly Dictionary<string, long> vocabulary, added;
    readonly List<long[]> template; // what surrounds a text; null is the text's place
    readonly bool clean, chinese, lower, unaccented, cutLeft;
    readonly int room;

    public WordPiece(JsonElement file, JsonElement settings)
    {
        JsonElement normalizer = file.GetProperty("normalizer"), model = file.GetProperty("model");
        JsonElement post = file.GetProperty("post_processor"), tokens = file.GetProperty("added_tokens");
        string Of(JsonElement part, string name) =>
            part.ValueKind == JsonValueKind.Object && part.TryGetProperty(name, out var found) ? $"{found}" : "";
        string type = Of(post, "type"), known = "BertNormalizer BertPreTokenizer WordPiece [UNK] ## 100";
        string kind = $"{Of(normalizer, "type")} {Of(file.GetProperty("pre_tokenizer"), "type")} {Of(model, "type")} "
            + $"{Of(model, "unk_token")} {Of(model, "continuing_subword_prefix")} {Of(model, "max_input_chars_per_word")}";
        if (kind != known || type is not ("TemplateProcessing" or "BertProcessing")
            || Regex.IsMatch($"{tokens}", @"""(single_word|lstrip|rstrip|normalized)"":\s*true"))
            throw new NotSupportedException("tokenizer.json is not BERT's WordPiece: use the Node example");
        if ("é".Normalize(NormalizationForm.FormD).Length < 2)
            throw new NotSupportedException(".NET runs without ICU, which accents need: install libicu");
        vocabulary = Numbers(model.GetProperty("vocab").EnumerateObject().Select(word => (word.Name, word.Value)));
        added = Numbers(tokens.EnumerateArray().Select(token => (Of(token, "content"), token.GetProperty("id"))));
        bool On(string name) => normalizer.GetProperty(name).GetBoolean();
        (clean, chinese, lower) = (On("clean_text"), On("handle_chinese_chars"), On("lowercase"));
        unaccented = Of(normalizer, "strip_accents") == "" ? lower : On("strip_accents");
        long[] Special(JsonElement item) => !item.TryGetProperty("SpecialToken", out var special) ? null
            : post.GetProperty("special_tokens").GetProperty(Of(special, "id")).GetProperty("ids").EnumerateArray()
                .Select(id => id.GetInt64()).ToArray();
        template = type == "TemplateProcessing" ? post.GetProperty("single").EnumerateArray().Select(Special).ToList()
            : new() { new[] { post.GetProperty("cls")[1].GetInt64() }, null, new[] { post.GetProperty("sep")[1].GetInt64() } };
        room = settings.GetProperty("max_length").GetInt32() - template.Sum(ids => ids?.Length ?? 0);
        cutLeft = Of(settings, "truncation_side") == "left";
    }

    static Dictionary<string, long> Numbers(IEnumerable<(string Name, JsonElement Number)> pairs) =>
        pairs.ToDictionary(pair => pair.Name, pair => pair.Number.GetInt64());

    public long[] Encode(string text)
    {
        var ids = new List<long>();
        var tokens = added.Keys.OrderByDescending(token => token.Length).Select(Regex.Escape).Append("(?!)");
        foreach (string part in Regex.Split(text, $"({string.Join('|', tokens)})"))
            if (added.TryGetValue(part, out long id)) ids.Add(id);
            else ids.AddRange(Words(part).SelectMany(Pieces));
        if (ids.Count > room) ids.RemoveRange(cutLeft ? 0 : room, ids.Count - room);
        return template.SelectMany(special => special ?? ids.ToArray()).ToArray();
    }

    string[] Words(string text)
    {
        string Each(string from, Func<Rune, string> change) => string.Concat(from.EnumerateRunes().Select(change));
        if (clean) text = Each(text, rune => rune.Value is '\t' or '\n' or '\r' ? " " : rune.Value == 0xFFFD
            || Rune.GetUnicodeCategory(rune) is Control or Format or PrivateUse ? "" : Rune.IsWhiteSpace(rune) ? " " : $"{rune}");
        if (chinese) text = Each(text, rune => IsChinese(rune.Value) ? $" {rune} " : $"{rune}");
        if (unaccented) text = Each(text.Normalize(NormalizationForm.FormD),
            rune => Rune.GetUnicodeCategory(rune) == NonSpacingMark ? "" : $"{rune}");
        if (lower) text = text.Replace("İ", "i\u0307").ToLowerInvariant();
        bool Mark(Rune rune) => Rune.IsPunctuation(rune) || rune.IsAscii && Rune.IsSymbol(rune);
        text = Each(text, rune => Mark(rune) ? $" {rune} " : $"{rune}");
        return text.Split((char[])null, StringSplitOptions.RemoveEmptyEntries);
    }

    static bool IsChinese(int code) => code is >= 0x3400 and <= 0x4DBF or >= 0x4E00 and <= 0x9FFF or >= 0xF900 and <= 0xFAFF
        or >= 0x20000 and <= 0x2A6DF or >= 0x2A700 and <= 0x2B73F or >= 0x2B740 and <= 0x2B81F
        or >= 0x2B920 and <= 0x2CEAF or >= 0x2F800 and <= 0x2FA1F;

    IEnumerable<long> Pieces(string word)
    {
        var pieces = new List<long>();
        for (int start = 0, end; start < word.Length; start = end)
        {
            long id = 0;
            for (end = word.Length; end > start; --end)
                if (vocabulary.TryGetValue((start > 0 ? "##" : "") + word[start..end], out id)) break;
            if (end == start || word.EnumerateRunes().Count() > 100) return new[] { vocabulary["[UNK]"] };
            pieces.Add(id);
        }
        return pieces;
    }
}
