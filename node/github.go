package node

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"cal/nucleus"
)

// Forge is where pull requests are opened. The token stays on the host.
type Forge struct {
	API   string // base URL; "" is GitHub's
	Token string
}

const githubAPI = "https://api.github.com"

func (f Forge) api() string {
	if f.API != "" {
		return f.API
	}
	return githubAPI
}

const forgeDeadline = 30 * time.Second

// open asks the forge for exactly the pull request that was decided. pushed is
// the head of the branch on the remote as last known.
// https://docs.github.com/rest/pulls/pulls#create-a-pull-request
func (f Forge) open(ctx context.Context, pr nucleus.PR, pushed string) (json.RawMessage, error) {
	if pushed != pr.HeadID {
		return nil, nucleus.Errorf(nucleus.KindConflict, "branch %s is at %.12s here, on the remote at %.12q: git_push first", pr.Head, pr.HeadID, pushed)
	}
	if f.Token == "" {
		return nil, nucleus.Errorf(nucleus.KindUnavailable, "no GitHub token on the host (GH_TOKEN in the environment of cal when it starts the node)")
	}
	body, err := json.Marshal(map[string]string{"title": pr.Title, "body": pr.Body, "base": pr.Base, "head": pr.Head})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, forgeDeadline)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, pr.API+"/repos/"+pr.Repository+"/pulls", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/vnd.github+json")
	req.Header.Set("Authorization", "Bearer "+f.Token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, nucleus.Errorf(nucleus.KindFailed, "create_pr: %v", err)
	}
	defer resp.Body.Close()
	var answer struct {
		URL     string `json:"html_url"`
		Number  int    `json:"number"`
		Message string `json:"message"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&answer); err != nil {
		return nil, nucleus.Errorf(nucleus.KindFailed, "create_pr: %s answered %s without JSON", pr.API, resp.Status)
	}
	if resp.StatusCode != http.StatusCreated {
		return nil, nucleus.Errorf(nucleus.KindFailed, "create_pr: %s answered %s: %s", pr.API, resp.Status, answer.Message)
	}
	return json.Marshal(map[string]string{"url": answer.URL, "number": fmt.Sprint(answer.Number)})
}
