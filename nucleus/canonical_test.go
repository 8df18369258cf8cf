package nucleus

import (
	"bytes"
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"pgregory.net/rapid"
)

func TestCanonicalRefuses(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"nothing", ``, "ends too early"},
		{"only space", " \n", "ends too early"},
		{"not a value", `hello`, `'h', want a value`},
		{"half a literal", `tru`, "want true"},
		{"literal in upper case", `True`, "want a value"},
		{"NaN", `NaN`, "want a value"},
		{"a value and more", `{} x`, "data after the value"},
		{"two values", `1 2`, "data after the value"},
		{"a stray bracket", `[1]]`, "data after the value"},
		{"a byte order mark", "\ufeff1", "want a value"},
		{"not UTF-8", "\"\xff\"", "not UTF-8"},
		{"overlong slash", "\"\xc0\xaf\"", "not UTF-8"},
		{"encoded surrogate", "\"\xed\xa0\x80\"", "not UTF-8"},
		{"not UTF-8 in a key", "{\"\xff\":1}", "not UTF-8"},
		{"duplicate key", `{"a":1,"b":2,"a":3}`, `duplicate key "a"`},
		{"duplicate key, spelled otherwise", `{"a":1,"\u0061":3}`, `duplicate key "a"`},
		{"duplicate key further in", `[{"x":{"k":1,"k":1}}]`, `duplicate key "k"`},
		{"duplicate empty key", `{"":1,"":1}`, `duplicate key ""`},
		{"lone high surrogate", `"\ud800"`, "lone surrogate"},
		{"lone low surrogate", `"\udc00"`, "lone surrogate"},
		{"pair the wrong way round", `"\udc00\ud800"`, "lone surrogate"},
		{"high surrogate before a letter", `"\ud800\u0041"`, "lone surrogate"},
		{"high surrogate at the end of input", `"\ud800`, "lone surrogate"},
		{"lone surrogate in a key", `{"\udead":1}`, "lone surrogate"},
		{"short escape", `"\u12"`, "four hexadecimal digits"},
		{"signed escape", `"\u+123"`, "four hexadecimal digits"},
		{"unknown escape", `"\x41"`, `unknown escape \x`},
		{"raw line feed", "\"a\nb\"", "control character 0x0a"},
		{"raw NUL", "\"\x00\"", "control character 0x00"},
		{"open string", `"abc`, "ends too early"},
		{"open escape", `"abc\`, "ends too early"},
		{"open array", `[1,`, "ends too early"},
		{"open object", `{"a":1`, "ends too early"},
		{"comma at the end of an array", `[1,]`, "want another element"},
		{"comma at the end of an object", `{"a":1,}`, "want another element"},
		{"comma at the start", `[,1]`, "want a value"},
		{"no comma", `[1 2]`, "want ',' or ']'"},
		{"no colon", `{"a" 1}`, "want ':'"},
		{"key is no string", `{1:2}`, "want a key"},
		{"single quotes", `{'a':1}`, "want a key"},
		{"comment", `[/*x*/1]`, "want a value"},
		{"2^53", `9007199254740992`, "beyond 2^53-1"},
		{"-2^53", `-9007199254740992`, "beyond 2^53-1"},
		{"beyond int64", `123456789012345678901234567890`, "beyond 2^53-1"},
		{"2^53 as a float", `9007199254740992.0`, "beyond 2^53-1"},
		{"an integer in disguise", `1e16`, "beyond 2^53-1"},
		{"-1e20", `-1e20`, "beyond 2^53-1"},
		{"beyond a float", `1e400`, "out of range"},
		{"leading zero", `01`, "leading zero"},
		{"leading zero after minus", `-01`, "leading zero"},
		{"only minus", `-`, "ends too early"},
		{"plus", `+1`, "want a value"},
		{"no digit before the point", `.5`, "want a value"},
		{"no digit after the point", `1.`, "ends too early"},
		{"no digit after the point, then more", `[1.]`, "want a digit"},
		{"no exponent", `1e`, "ends too early"},
		{"hexadecimal", `0x10`, "data after the value"},
		{"65 arrays deep", strings.Repeat("[", 66) + strings.Repeat("]", 66), "nested deeper than 64"},
		{"a million arrays deep", strings.Repeat("[", 1e6), "nested deeper than 64"},
		{"a million objects deep", strings.Repeat(`{"a":`, 1e6), "nested deeper than 64"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := CanonicalJSON([]byte(c.in))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("CanonicalJSON(%.60q) = %.60q, %v; want an error with %q", c.in, got, err, c.want)
			}
		})
	}
}

func TestCanonicalAccepts(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		// RFC 8785, 3.2.2: the whole sample, with the numbers of section 3.2.4.
		{"RFC 8785 sample", `{
		  "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
		  "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
		  "literals": [null, true, false]
		}`, `{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],"string":"€$\u000f\nA'B\"\\\\\"/"}`},
		// RFC 8785, 3.2.3: keys in the order of their UTF-16 code units.
		{"RFC 8785 keys", `{
		  "\u20ac": "Euro Sign",
		  "\r": "Carriage Return",
		  "\ufb33": "Hebrew Letter Dalet With Dagesh",
		  "1": "One",
		  "\ud83d\ude00": "Emoji: Grinning Face",
		  "\u0080": "Control",
		  "\u00f6": "Latin Small Letter O With Diaeresis"
		}`, "{\"\\r\":\"Carriage Return\",\"1\":\"One\",\"\u0080\":\"Control\",\"ö\":\"Latin Small Letter O With Diaeresis\"," +
			"\"€\":\"Euro Sign\",\"😀\":\"Emoji: Grinning Face\",\"\ufb33\":\"Hebrew Letter Dalet With Dagesh\"}"},
		{"prefix before longer key", `{"ab":1,"a":2,"":3}`, `{"":3,"a":2,"ab":1}`},
		{"nested objects sorted each", `{"b":{"z":1,"a":[{"d":1,"c":2}]},"a":1}`, `{"a":1,"b":{"a":[{"c":2,"d":1}],"z":1}}`},
		{"space", " [ 1 ,\t2 ,\r\n{ \"a\" : 1 } ] ", `[1,2,{"a":1}]`},
		{"empty", `[{},[],""]`, `[{},[],""]`},
		{"controls", `"\u0000\u0008\u0009\u000a\u000b\u000c\u000d\u001f\u007f"`, "\"\\u0000\\b\\t\\n\\u000b\\f\\r\\u001f\u007f\""},
		{"what HTML escapes", `"<>&\u2028\u2029"`, "\"<>&\u2028\u2029\""},
		{"the replacement character itself", `"\ufffd"`, "\"\ufffd\""},
		{"a pair", `"\uD83D\uDE00"`, `"😀"`},
		{"an escaped backslash before u", `"\\ud800"`, `"\\ud800"`},
		{"minus zero", `-0`, `0`},
		{"minus zero as a float", `-0.0`, `0`},
		{"2^53-1", `9007199254740991`, `9007199254740991`},
		{"-(2^53-1)", `-9007199254740991`, `-9007199254740991`},
		{"an integer as a float", `1.50e1`, `15`},
		{"64 deep", strings.Repeat("[", 65) + strings.Repeat("]", 65), strings.Repeat("[", 65) + strings.Repeat("]", 65)},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := CanonicalJSON([]byte(c.in))
			if err != nil || string(got) != c.want {
				t.Fatalf("CanonicalJSON(%q)\n got %q, %v\nwant %q", c.in, got, err, c.want)
			}
		})
	}
}

// RFC 8785, appendix B.
func TestCanonicalNumbers(t *testing.T) {
	for _, c := range []struct {
		bits uint64
		want string
	}{
		{0x0000000000000000, "0"},
		{0x8000000000000000, "0"},
		{0x0000000000000001, "5e-324"},
		{0x8000000000000001, "-5e-324"},
		{0x7fefffffffffffff, "1.7976931348623157e+308"},
		{0xffefffffffffffff, "-1.7976931348623157e+308"},
		{0x4340000000000000, "9007199254740992"},
		{0xc340000000000000, "-9007199254740992"},
		{0x4430000000000000, "295147905179352830000"},
		{0x44b52d02c7e14af5, "9.999999999999997e+22"},
		{0x44b52d02c7e14af6, "1e+23"},
		{0x44b52d02c7e14af7, "1.0000000000000001e+23"},
		{0x444b1ae4d6e2ef4e, "999999999999999700000"},
		{0x444b1ae4d6e2ef4f, "999999999999999900000"},
		{0x444b1ae4d6e2ef50, "1e+21"},
		{0x3eb0c6f7a0b5ed8c, "9.999999999999997e-7"},
		{0x3eb0c6f7a0b5ed8d, "0.000001"},
		{0x41b3de4355555553, "333333333.3333332"},
		{0x41b3de4355555554, "333333333.33333325"},
		{0x41b3de4355555555, "333333333.3333333"},
		{0x41b3de4355555556, "333333333.3333334"},
		{0x41b3de4355555557, "333333333.33333343"},
		{0xbecbf647612f3696, "-0.0000033333333333333333"},
		{0x43143ff3c1cb0959, "1424953923781206.2"},
	} {
		if got := string(appendNumber(nil, math.Float64frombits(c.bits))); got != c.want {
			t.Errorf("%016x: got %s, want %s", c.bits, got, c.want)
		}
	}
}

func TestCanonicalOfGoValues(t *testing.T) {
	type inner struct{ S string }
	bad := "a\xffb"
	for _, c := range []struct {
		name string
		in   any
	}{
		{"string", bad},
		{"pointer", &bad},
		{"field", inner{bad}},
		{"embedded", struct{ inner }{inner{bad}}},
		{"slice", []string{"ok", bad}},
		{"array", [1]string{bad}},
		{"map value", map[string]string{"k": bad}},
		{"map key", map[string]int{bad: 1}},
		{"interface", []any{map[string]any{"k": bad}}},
		{"named string", Op(bad)},
		{"raw message", json.RawMessage("\"\xff\"")},
		{"text marshaler", badText{}},
		{"deep in an action", Action{Op: RunBash, Command: &Command{Argv: []string{"echo", bad}}}},
		{"environment", Action{Op: RunBash, Command: &Command{Env: map[string]string{"A": bad}}}},
	} {
		if got, err := Canonical(c.in); err == nil || !strings.Contains(err.Error(), "not UTF-8") {
			t.Errorf("%s: got %q, %v; want the refusal of text that is not UTF-8", c.name, got, err)
		}
	}
	type cycle struct{ Next *cycle }
	loop := &cycle{}
	loop.Next = loop
	for _, c := range []struct {
		name string
		in   any
	}{
		{"NaN", math.NaN()},
		{"infinity", math.Inf(1)},
		{"channel", make(chan int)},
		{"2^53", int64(1 << 53)},
		{"a cycle", loop},
		{"duplicate keys in a raw message", json.RawMessage(`{"a":1,"a":2}`)},
	} {
		if got, err := Canonical(c.in); err == nil {
			t.Errorf("%s: got %s, want an error", c.name, got)
		}
	}
	good := struct {
		Raw   json.RawMessage
		Bytes []byte
		Text  string
		Skip  string `json:"-"`
		Legs  Legs
	}{json.RawMessage(`{"b":"\ufffd","a":1}`), []byte{0xff, 0xfe}, "<\ufffd>", bad, Private}
	want := `{"Bytes":"//4=","Legs":1,"Raw":{"a":1,"b":"` + "\ufffd" + `"},"Text":"<` + "\ufffd" + `>"}`
	if got, err := Canonical(good); err != nil || string(got) != want {
		t.Errorf("got %s, %v; want %s", got, err, want)
	}
}

type badText struct{}

func (badText) MarshalText() ([]byte, error) { return []byte("\xff"), nil }

// anyJSON draws a value as encoding/json would decode it.
func anyJSON(depth int) *rapid.Generator[any] {
	leaf := []*rapid.Generator[any]{
		rapid.Just(any(nil)),
		rapid.Bool().AsAny(),
		rapid.String().Filter(utf8.ValidString).AsAny(),
		rapid.Int64Range(-maxInteger, maxInteger).AsAny(),
		rapid.Float64().Filter(func(f float64) bool { return math.Abs(f) <= maxInteger }).AsAny(),
	}
	if depth == 0 {
		return rapid.OneOf(leaf...)
	}
	next := rapid.Deferred(func() *rapid.Generator[any] { return anyJSON(depth - 1) })
	return rapid.OneOf(append(leaf,
		rapid.SliceOfN(next, 0, 4).AsAny(),
		rapid.MapOfN(rapid.String().Filter(utf8.ValidString), next, 0, 4).AsAny())...)
}

func TestCanonicalIsOneForm(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		value := anyJSON(4).Draw(t, "value")
		once, err := Canonical(value)
		if err != nil {
			t.Fatal(err)
		}
		twice, err := CanonicalJSON(once)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("not idempotent:\n%s\n%s, %v", once, twice, err)
		}
		// Another spelling of the same value: indented, HTML characters escaped.
		other, err := json.MarshalIndent(value, " ", "\t")
		if err != nil {
			t.Fatal(err)
		}
		if same, err := CanonicalJSON(other); err != nil || !bytes.Equal(once, same) {
			t.Fatalf("two spellings, two forms:\n%s\n%s, %v", once, same, err)
		}
		checkSameValue(t, other, once)
	})
}

func TestCompareUTF16(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		runes := rapid.SliceOfN(rapid.OneOf(
			rapid.Just('a'), rapid.Just('\ue000'), rapid.Just('\uffff'), rapid.Just('\U00010000'), rapid.Just('\U0010ffff'), rapid.Just('\ud7ff'),
			rapid.Rune()), 0, 4)
		a, b := string(runes.Draw(t, "a")), string(runes.Draw(t, "b"))
		if got, want := sign(compareUTF16([]byte(a), []byte(b))), sign(slowCompareUTF16(a, b)); got != want {
			t.Fatalf("compareUTF16(%q, %q) = %d, want %d", a, b, got, want)
		}
	})
}

func FuzzCanonical(f *testing.F) {
	for _, seed := range []string{`{"b":[1,2.5e3,"\u00e9\ud83d\ude00"],"a":null}`, `"\ud800"`, `[{"a":{"a":1,"a":2}}]`, `1e16`, `-0.0`, `{"a":1,}`, "\"\xff\""} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		out, err := CanonicalJSON(in)
		if err != nil {
			return
		}
		if !json.Valid(in) {
			t.Fatalf("accepted %q, which is not JSON", in)
		}
		if again, err := CanonicalJSON(out); err != nil || !bytes.Equal(out, again) {
			t.Fatalf("not idempotent: %q, then %q, %v", out, again, err)
		}
		checkSameValue(t, in, out)
	})
}

// TestCanonicalCost guards against work that grows faster than the input, with
// bounds so wide that a busy machine keeps them.
func TestCanonicalCost(t *testing.T) {
	text := strings.Repeat("x\\n", 16<<20/3)
	deep := strings.Repeat(`{"b":1,"a":`, 60) + `"` + strings.Repeat("y", 4<<20) + `"` + strings.Repeat("}", 60)
	keys := &strings.Builder{}
	keys.WriteString("{")
	for i := range 200_000 {
		if i > 0 {
			keys.WriteString(",")
		}
		keys.WriteString(`"` + time.Duration(i*7919%200_003).String() + `":1`)
	}
	keys.WriteString("}")
	for name, in := range map[string]string{"16 MiB string": `"` + text + `"`, "4 MiB below 60 unsorted objects": deep, "200,000 keys": keys.String()} {
		start := time.Now()
		if _, err := CanonicalJSON([]byte(in)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("%s took %v", name, took)
		}
	}
}

func BenchmarkCanonical1KiB(b *testing.B) {
	action := Action{Op: RunBash, Args: SHA256(nil), Command: &Command{
		Argv: []string{"go", "test", "./..."}, Dir: "app", Binary: "/usr/local/go/bin/go", Env: map[string]string{"CI": "1", "A": "b"},
		Files: []File{{Path: strings.Repeat("dir/", 20), Before: SHA256(nil)}, {Path: strings.Repeat("dir/", 20), Before: SHA256(nil)}, {Path: "c", Before: SHA256(nil), After: SHA256(nil)}},
	}}
	raw, err := Canonical(action)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("value", func(b *testing.B) {
		b.SetBytes(int64(len(raw)))
		b.ReportAllocs()
		for b.Loop() {
			Canonical(action)
		}
	})
	b.Run("json", func(b *testing.B) {
		b.SetBytes(int64(len(raw)))
		b.ReportAllocs()
		for b.Loop() {
			CanonicalJSON(raw)
		}
	})
}

func BenchmarkCanonical16MiBString(b *testing.B) {
	raw, _ := json.Marshal(map[string]string{"content": strings.Repeat("line of text\n", 16<<20/13)})
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		CanonicalJSON(raw)
	}
}

type failer interface{ Fatalf(string, ...any) }

func checkSameValue(t failer, a, b []byte) {
	var x, y any
	if err := json.Unmarshal(a, &x); err != nil {
		t.Fatalf("%q: %v", a, err)
	}
	if err := json.Unmarshal(b, &y); err != nil {
		t.Fatalf("%q: %v", b, err)
	}
	p, _ := json.Marshal(x)
	q, _ := json.Marshal(y)
	// -0 and 0 are one number; json.Marshal tells them apart.
	if p, q = dropMinusZero(p), dropMinusZero(q); !bytes.Equal(p, q) {
		t.Fatalf("value changed:\n%s\n%s", p, q)
	}
}
