"""Operations on a model whose weights are residuals: done right, or refused before anything is changed."""
