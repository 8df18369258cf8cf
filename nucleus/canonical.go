package nucleus

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// maxInteger is the largest integer that every JSON implementation keeps exact
// (RFC 7493, 2.2; RFC 8785, 3.2.2.3).
const maxInteger = 1<<53 - 1

const maxDepth = 64

// Canonical returns the RFC 8785 (JCS) bytes of v, which is first marshalled
// with encoding/json. It is the only form that is ever signed or hashed.
func Canonical(v any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return CanonicalJSON(buf.Bytes())
}

// CanonicalJSON returns the RFC 8785 bytes of one JSON value. It refuses what
// two readers could understand differently: text that is not UTF-8, lone
// surrogates, duplicate keys, integers beyond 2^53-1, data after the value,
// nesting deeper than 64.
func CanonicalJSON(raw []byte) ([]byte, error) {
	if !utf8.Valid(raw) {
		return nil, errors.New("canonical JSON: text is not UTF-8")
	}
	if err := checkSurrogates(raw); err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var out bytes.Buffer
	if err := canonicalValue(&out, dec, 0); err != nil {
		return nil, fmt.Errorf("canonical JSON: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("canonical JSON: data after the value")
	}
	return out.Bytes(), nil
}

func canonicalValue(out *bytes.Buffer, dec *json.Decoder, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("nested deeper than %d", maxDepth)
	}
	token, err := dec.Token()
	if err != nil {
		return err
	}
	switch t := token.(type) {
	case json.Delim:
		if t == '[' {
			return canonicalArray(out, dec, depth)
		}
		return canonicalObject(out, dec, depth)
	case string:
		canonicalString(out, t)
	case json.Number:
		return canonicalNumber(out, t.String())
	case bool:
		out.WriteString(strconv.FormatBool(t))
	case nil:
		out.WriteString("null")
	}
	return nil
}

func canonicalArray(out *bytes.Buffer, dec *json.Decoder, depth int) error {
	out.WriteByte('[')
	for first := true; dec.More(); first = false {
		if !first {
			out.WriteByte(',')
		}
		if err := canonicalValue(out, dec, depth+1); err != nil {
			return err
		}
	}
	out.WriteByte(']')
	_, err := dec.Token()
	return err
}

func canonicalObject(out *bytes.Buffer, dec *json.Decoder, depth int) error {
	type member struct {
		key   string
		order []uint16
		value []byte
	}
	var members []member
	seen := map[string]bool{}
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return err
		}
		key := token.(string) // the decoder admits nothing else as a key
		if seen[key] {
			return fmt.Errorf("duplicate key %q", key)
		}
		seen[key] = true
		var value bytes.Buffer
		if err := canonicalValue(&value, dec, depth+1); err != nil {
			return err
		}
		members = append(members, member{key, utf16.Encode([]rune(key)), value.Bytes()})
	}
	if _, err := dec.Token(); err != nil {
		return err
	}
	// RFC 8785, 3.2.3: keys are sorted by their UTF-16 code units.
	slices.SortFunc(members, func(a, b member) int { return slices.Compare(a.order, b.order) })
	out.WriteByte('{')
	for i, m := range members {
		if i > 0 {
			out.WriteByte(',')
		}
		canonicalString(out, m.key)
		out.WriteByte(':')
		out.Write(m.value)
	}
	out.WriteByte('}')
	return nil
}

func canonicalString(out *bytes.Buffer, s string) {
	const hex = "0123456789abcdef"
	out.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			out.WriteByte('\\')
			out.WriteRune(r)
		case r >= 0x20:
			out.WriteRune(r)
		case strings.ContainsRune("\b\t\n\f\r", r):
			out.WriteByte('\\')
			out.WriteByte("btn_fr"[r-'\b'])
		default:
			out.WriteString(`\u00`)
			out.WriteByte(hex[r>>4])
			out.WriteByte(hex[r&15])
		}
	}
	out.WriteByte('"')
}

func canonicalNumber(out *bytes.Buffer, text string) error {
	if !strings.ContainsAny(text, ".eE") {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n > maxInteger || n < -maxInteger {
			return fmt.Errorf("integer %s is beyond 2^53-1", text)
		}
		out.WriteString(strconv.FormatInt(n, 10))
		return nil
	}
	f, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsInf(f, 0) || math.IsNaN(f) {
		return fmt.Errorf("number %s is out of range", text)
	}
	if f == 0 {
		f = 0 // RFC 8785, 3.2.2.3: minus zero is written 0
	}
	// encoding/json writes a float64 as ECMAScript does, which RFC 8785 asks for.
	number, err := json.Marshal(f)
	if err != nil {
		return err
	}
	if string(number) == "-0" {
		number = []byte("0")
	}
	out.Write(number)
	return nil
}

// checkSurrogates refuses \uD800-\uDFFF escapes that form no pair: decoders
// replace them by U+FFFD without a word.
func checkSurrogates(raw []byte) error {
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			continue
		}
		unit, ok := escapedUnit(raw[i:])
		if !ok {
			i++ // some other escape: skip the escaped byte
			continue
		}
		if !utf16.IsSurrogate(unit) {
			i += 5
			continue
		}
		low, ok := escapedUnit(raw[min(i+6, len(raw)):])
		if !ok || utf16.DecodeRune(unit, low) == utf8.RuneError {
			return fmt.Errorf("canonical JSON: lone surrogate at byte %d", i)
		}
		i += 11
	}
	return nil
}

func escapedUnit(raw []byte) (rune, bool) {
	if len(raw) < 6 || raw[0] != '\\' || raw[1] != 'u' {
		return 0, false
	}
	n, err := strconv.ParseUint(string(raw[2:6]), 16, 16)
	return rune(n), err == nil
}
