package tools

import (
	"encoding/json"
	"fmt"
	"strings"

	"cal/nucleus"
)

// Text shows a result document as a model reads it best: files with line
// numbers, searches as grep prints them, commands as a terminal shows them. What it
// does not know, or what is not text, it returns as it is. An image is the caller's
// to show.
func Text(op nucleus.Op, value json.RawMessage) string {
	switch op {
	case nucleus.ReadFiles:
		return text(value, ReadResult.text)
	case nucleus.GlobSearch:
		return text(value, GlobResult.text)
	case nucleus.GrepSearch:
		return text(value, GrepResult.text)
	case nucleus.RunBash:
		return text(value, RunResult.text)
	}
	return string(value)
}

func text[T any](value json.RawMessage, show func(T) string) string {
	var result T
	if err := nucleus.Strict(value, &result); err != nil {
		return string(value)
	}
	return show(result)
}

func (r ReadResult) text() string {
	if r.Total == 0 && r.Image == nil {
		return fmt.Sprintf("[%s is empty]", r.Path)
	}
	var b strings.Builder
	number := r.Start
	for line := range strings.Lines(r.Content) {
		fmt.Fprintf(&b, "%6d\t%s", number, line)
		number++
	}
	return withNotice(b.String(), r.Notice)
}

func (r GlobResult) text() string {
	if len(r.Paths) == 0 {
		return withNotice("[no file matches]", r.Notice)
	}
	return withNotice(strings.Join(r.Paths, "\n"), r.Notice)
}

func (r GrepResult) text() string {
	if len(r.Matches) == 0 {
		return withNotice(fmt.Sprintf("[no match in %d files]", r.Files), r.Notice)
	}
	var b strings.Builder
	for i, m := range r.Matches {
		if i > 0 && len(m.Before)+len(m.After) > 0 {
			b.WriteString("--\n")
		}
		for j, line := range m.Before {
			fmt.Fprintf(&b, "%s-%d-%s\n", m.Path, m.Line-len(m.Before)+j, line)
		}
		fmt.Fprintf(&b, "%s:%d:%s\n", m.Path, m.Line, m.Text)
		for j, line := range m.After {
			fmt.Fprintf(&b, "%s-%d-%s\n", m.Path, m.Line+1+j, line)
		}
	}
	return withNotice(b.String(), r.Notice)
}

func (r RunResult) text() string {
	var b strings.Builder
	for _, s := range []struct{ name, text, binary string }{{"stdout", r.Stdout, r.StdoutB64}, {"stderr", r.Stderr, r.StderrB64}} {
		if s.binary != "" {
			s.text = fmt.Sprintf("[%s is not UTF-8; Base64:]\n%s", s.name, s.binary)
		}
		if s.text == "" {
			continue
		}
		if s.name == "stderr" {
			b.WriteString("[stderr]\n")
		}
		b.WriteString(strings.TrimSuffix(s.text, "\n") + "\n")
	}
	switch {
	case r.Running:
		fmt.Fprintf(&b, "[running in the background as %s]\n", r.ID)
	case r.ExitCode != 0 || b.Len() == 0 || r.ID != "":
		fmt.Fprintf(&b, "[exit code %d]\n", r.ExitCode)
	}
	return withNotice(b.String(), r.Notice)
}

func withNotice(text, notice string) string {
	text = strings.TrimSuffix(text, "\n")
	if notice == "" {
		return text
	}
	return strings.TrimPrefix(text+"\n["+notice+"]", "\n")
}
