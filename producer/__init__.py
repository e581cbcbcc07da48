"""Submit chat and summary requests to glmq, stream their answers. No torch here."""
