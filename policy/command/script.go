package command

import (
	"fmt"
	"strings"

	"mvdan.cc/sh/v3/syntax"
)

// script reads a shell script: every command in it, those in pipelines, lists,
// functions and substitutions too, whether they would run or not.
func (r *reader) script(source word, depth int) {
	whole := []word{{"script", true}}
	switch {
	case !source.known:
		r.add(whole, Arbitrary, "the script is not known before it runs")
		return
	case len(source.text) > maxScript:
		r.add(whole, Arbitrary, fmt.Sprintf("the script has %d bytes; at most %d are read", len(source.text), maxScript))
		return
	case depth >= maxDepth:
		r.add(whole, Arbitrary, fmt.Sprintf("more than %d commands within each other", maxDepth))
		return
	}
	file, err := syntax.NewParser(syntax.Variant(syntax.LangBash)).Parse(strings.NewReader(source.text), "")
	if err != nil {
		r.add(whole, Arbitrary, fmt.Sprintf("the script cannot be read: %v", err))
		return
	}
	outer := r.functions
	r.functions = map[string]bool{}
	for name := range outer {
		r.functions[name] = true
	}
	syntax.Walk(file, func(n syntax.Node) bool {
		if f, ok := n.(*syntax.FuncDecl); ok && f.Name != nil {
			r.functions[f.Name.Value] = true
		}
		return true
	})
	syntax.Walk(file, func(n syntax.Node) bool {
		r.node(n, depth)
		return true
	})
	r.functions = outer
}

func (r *reader) node(n syntax.Node, depth int) {
	switch n := n.(type) {
	case *syntax.CallExpr:
		for _, a := range n.Assigns {
			r.assign(a)
		}
		if len(n.Args) > 0 {
			r.builtin(static(n.Args), depth+1)
		}
	case *syntax.DeclClause:
		for _, a := range n.Args {
			r.assign(a)
		}
	case *syntax.Redirect:
		r.redirect(n)
	case *syntax.ParamExp:
		if n.Exp != nil && n.Exp.Op == syntax.OtherParamOps {
			r.raise(Arbitrary, "an expansion that may run what a variable holds")
		}
	}
}

func (r *reader) assign(a *syntax.Assign) {
	if a.Naked || a.Name == nil || harmlessVariable(a.Name.Value) {
		return
	}
	r.raise(Arbitrary, "sets "+a.Name.Value+", which can change what runs")
}

// builtin reads a command of a script, which may be the shell's own.
func (r *reader) builtin(words []word, depth int) {
	if words[0].known {
		switch words[0].text {
		case "cd", "pushd", "popd", "dirs", "pwd", ":", "true", "false", "exit", "return", "break", "continue", "shift", "set", "unset", "wait", "jobs", "fg", "bg",
			"umask", "ulimit", "type", "hash", "getopts", "let", "shopt":
			r.add(words, ReadOnly, "the shell's own")
			return
		case "read":
			r.add(words, ReadOnly, "the shell's own")
			return
		case "trap", "alias", "enable", "bind", "complete", "compgen", "mapfile", "readarray":
			r.add(words, Arbitrary, words[0].text+" makes the shell run what it is told")
			return
		}
	}
	r.command(words, depth)
}

func (r *reader) redirect(n *syntax.Redirect) {
	switch n.Op {
	case syntax.RdrIn, syntax.DplIn, syntax.DplOut, syntax.Hdoc, syntax.DashHdoc, syntax.WordHdoc:
		if n.Word != nil && n.Op == syntax.RdrIn && strings.HasPrefix(text(n.Word).text, "/dev/tcp/") {
			r.raise(Network, "reads from the network")
		}
		return
	}
	if n.Word == nil {
		return
	}
	target := text(n.Word)
	switch {
	case strings.HasPrefix(target.text, "/dev/tcp/") || strings.HasPrefix(target.text, "/dev/udp/"):
		r.raise(Network, "writes to the network")
	case target.known && (target.text == "/dev/null" || target.text == "/dev/stdout" || target.text == "/dev/stderr"):
	default:
		r.raise(Writes, "writes to a file")
	}
}

func static(args []*syntax.Word) []word {
	words := make([]word, len(args))
	for i, a := range args {
		words[i] = text(a)
	}
	return words
}

// text is a word as the program gets it, if nothing in it is expanded.
func text(w *syntax.Word) word {
	out := word{known: true}
	for _, part := range w.Parts {
		switch p := part.(type) {
		case *syntax.Lit:
			literal, ok := unescape(p.Value)
			out.text += literal
			out.known = out.known && ok
		case *syntax.SglQuoted:
			out.text += p.Value
			out.known = out.known && (!p.Dollar || !strings.Contains(p.Value, `\`))
		case *syntax.DblQuoted:
			for _, inner := range p.Parts {
				literal, ok := inner.(*syntax.Lit)
				if !ok {
					out.known = false
					continue
				}
				value, ok := unescapeQuoted(literal.Value)
				out.text += value
				out.known = out.known && ok
			}
		default:
			out.known = false
		}
	}
	return out
}

// unescape reads a word outside quotes. Wildcards, braces and a tilde become
// something else.
func unescape(s string) (string, bool) {
	known := true
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case '\\':
			if i++; i < len(s) && s[i] != '\n' {
				b.WriteByte(s[i])
			}
		case '*', '?', '[', '{', '~':
			known = known && (c == '{' && s == "{}" || c == '~' && i > 0)
			b.WriteByte(c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String(), known
}

func unescapeQuoted(s string) (string, bool) {
	if !strings.Contains(s, `\`) {
		return s, true
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) && strings.IndexByte("$`\"\\\n", s[i+1]) >= 0 {
			if i++; s[i] != '\n' {
				b.WriteByte(s[i])
			}
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String(), true
}
